"""The finished runs of one setting, paired by seed: differences, verdicts, and the share of each class in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.runs.difference import (
    LEVEL,
    RARE,
    Difference,
    Resampled,
    Variances,
    class_shares,
    difference,
    grouped,
    occurrences,
    of_one_table,
    resample,
    score,
)
from reports.analysis.statistics import holm
from reports.read.collect import Collected, ImageCounts

BETTER, WORSE, SAME = "better", "worse", "no significant difference"
NO_VERDICT = "no verdict"
"""There is one seed, or one group of images."""
NOT_COMPARABLE = "not comparable"
"""There is no seed in common, or the images differ."""

BEST, TIED = "best", "tied"
"""In comparison with the best method, beside `WORSE`, `NO_VERDICT` and `NOT_COMPARABLE`."""


class Size(NamedTuple):
    """The numbers of a label's test images, groups and rare classes; zeros if no image can be read."""

    images: int = 0
    groups: int = 0
    rare_classes: int = 0
    """Classes that are labelled in fewer groups than `RARE`; 0 if the score is that of one class."""


class ToBest(NamedTuple):
    """A label compared with the best one."""

    verdict: str
    """`BEST`, `TIED`, `WORSE`, `NO_VERDICT` or `NOT_COMPARABLE`."""
    reason: str = ""
    """Why there is no verdict."""
    seeds: int = 0
    """The seeds that are compared."""


@dataclass(frozen=True)
class _Run:
    names: tuple[str, ...]
    """Of the images."""
    counts: np.ndarray
    """int64 [G, 3, K]: the sums over the groups of images."""
    miou: np.ndarray
    """[N]: of each image, over the classes that occur in it."""


class Paired:
    """The runs of a setting, paired by seed. Every file is read once, and every run resampled once."""

    def __init__(self, collected: Collected, runs: pd.DataFrame, metric: str | Mapping[str, int]):
        """`metric`: one of `METRICS`, or the index of a class by run."""
        self.setting = runs["setting"].iloc[0]
        self.setting_name = runs["setting_name"].iloc[0]
        self.methods = dict(zip(runs["label"], runs["method"], strict=True))
        self.runs = {label: dict(zip(group["seed"], group["fingerprint"], strict=True))
                     for label, group in runs.groupby("label")}  # fmt: skip
        self.class_names = next((collected.class_names[run] for run in runs["fingerprint"]
                                 if run in collected.class_names), [])  # fmt: skip
        """Empty where no run records its scores per class."""
        self.unreadable: dict[str, str] = {}
        """Run -> why its matrices cannot be used."""
        self._metric = metric
        self._resampled: dict[str, Resampled] = {}
        self._tables: dict[str, tuple[dict[str, Difference], dict[str, str]]] = {}
        read: dict[str, ImageCounts] = {}
        for fingerprint in (run for of_label in self.runs.values() for run in of_label.values()):
            try:
                read[fingerprint] = collected.counts(fingerprint)
            except UserError as error:
                self.unreadable[fingerprint] = str(error)
        # Older runs do not record groups: they have those of newer runs on the same images.
        groups = {tuple(one.names): one.groups for one in read.values() if one.groups is not None}
        self.groups_known = all(tuple(one.names) in groups for one in read.values())
        self._read = {
            run: _Run(names := tuple(one.names), grouped(one.counts, groups.get(names)), score(one.counts))
            for run, one in read.items()
        }

    def differences_to(self, reference: str) -> tuple[dict[str, Difference], dict[str, str]]:
        """The differences of other labels to the reference: the comparisons of one table; and why others have none."""
        if reference not in self._tables:
            found, reasons = {}, {}
            for label in sorted(self.runs.keys() - {reference}):
                try:
                    pairs = self._pairs(label, reference)
                except UserError as error:
                    reasons[label] = str(error)
                    continue
                own, base = ([self._resample(run) for run in side] for side in zip(*pairs, strict=True))
                found[label] = difference(own, base)
            self._tables[reference] = of_one_table(found), reasons
        return self._tables[reference]

    def size(self, label: str) -> Size:
        for fingerprint in self.runs[label].values():
            if fingerprint in self._read:
                run = self._read[fingerprint]
                found = occurrences(run.counts)
                rare = int(((found > 0) & (found < RARE)).sum()) if isinstance(self._metric, str) else 0
                return Size(len(run.names), self._resample(fingerprint).groups, rare)
        return Size()

    def why_missing(self, a: str, b: str) -> str:
        """The reasons why runs of two labels are left out of their comparison."""
        runs = {*self.runs[a].values(), *self.runs[b].values()}
        return "; ".join(self.unreadable[run] for run in sorted(runs & self.unreadable.keys()))

    def image_scores(self) -> list[dict[str, Any]]:
        """The mIoU of each image for each label, mean over the readable runs on the same images."""
        rows = []
        for label, runs in self.runs.items():
            read = [self._read[run] for run in runs.values() if run in self._read]
            scores = [one.miou for one in read if one.names == read[0].names]
            if scores:
                rows += [{"setting": self.setting, "label": label, "image": image, "miou": float(mean)}
                         for image, mean in zip(read[0].names, np.mean(scores, axis=0), strict=True)]  # fmt: skip
        return rows

    def shares(self, a: str, b: str) -> np.ndarray | None:
        """[K]: what each class adds to the difference, mean over seeds; their sum is the difference. None for the
        score of one class."""
        if not isinstance(self._metric, str):
            return None
        metric = self._metric
        own, base = ([class_shares(self._read[run].counts.sum(0), metric) for run in side]
                     for side in zip(*self._pairs(a, b), strict=True))  # fmt: skip
        return np.asarray(np.mean(own, axis=0) - np.mean(base, axis=0))

    def _pairs(self, a: str, b: str) -> list[tuple[str, str]]:
        """The pairs of readable runs that share a seed. Raises `UserError` if there are none, or the images differ."""
        pairs = [(self.runs[a][seed], self.runs[b][seed]) for seed in sorted(self.runs[a].keys() & self.runs[b].keys())]
        if not pairs:
            raise UserError("no seed in common")
        pairs = [pair for pair in pairs if not self.unreadable.keys() & set(pair)]
        if not pairs:
            raise UserError(self.why_missing(a, b))
        first = self._read[pairs[0][0]]
        for fingerprint in itertools.chain(*pairs):
            other = self._read[fingerprint]
            if other.names != first.names or other.counts.shape != first.counts.shape:
                raise UserError(f"run {fingerprint} was evaluated on other images, or in another order")
        return pairs

    def _resample(self, fingerprint: str) -> Resampled:
        """For the score of one class, only the groups in which a run of the setting has it: others do not affect it."""
        if fingerprint not in self._resampled:
            run = self._read[fingerprint]
            if isinstance(self._metric, str):
                self._resampled[fingerprint] = resample(run.counts, self._metric)
            else:
                index = self._metric[fingerprint]
                same = [one.counts for one in self._read.values() if one.names == run.names]
                has_class = np.any([counts[:, 1:, index].sum(1) > 0 for counts in same], axis=0)
                self._resampled[fingerprint] = resample(run.counts[has_class], index)
        return self._resampled[fingerprint]


def against_reference(paired: Paired, reference: str) -> list[dict[str, Any]]:
    """Every other label of a setting, compared with the reference. Holm corrects for them together."""
    if reference not in paired.runs:
        return []
    differences, reasons = paired.differences_to(reference)
    rows: list[dict[str, Any]] = []
    for label in sorted(paired.runs.keys() - {reference}):
        row: dict[str, Any] = {
            "setting": paired.setting,
            "setting_name": paired.setting_name,
            "reference": reference,
            "label": label,
            "method": paired.methods[label],
        }
        if label in differences:
            found = differences[label]
            interval, size = found.interval, paired.size(label)
            reason = "; ".join(filter(None, (found.why_untested, paired.why_missing(label, reference)))) or None
            row |= {"seeds": found.seeds, "images": size.images, "groups": found.groups,
                    "rare_classes": size.rare_classes,
                    "groups_known": paired.groups_known, "difference": found.estimate, "low": interval.low,
                    "high": interval.high, "seed_variance": found.seed_variance,
                    "image_variance": found.image_variance, "detectable": found.detectable, "p": found.p,
                    "reason": reason}  # fmt: skip
        else:
            row |= {
                "seeds": 0,
                "images": 0,
                "groups": 0,
                "rare_classes": 0,
                "groups_known": True,
                "reason": reasons[label],
            }
            row |= dict.fromkeys(
                ["difference", "low", "high", "seed_variance", "image_variance", "detectable", "p"], math.nan
            )
        rows.append(row)
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row |= {"p_holm": float(p), "verdict": _verdict(row, float(p))}
    return rows


def _verdict(row: Mapping[str, Any], p: float) -> str:
    if math.isnan(p):
        return NO_VERDICT if row["seeds"] else NOT_COMPARABLE
    if p >= 1 - LEVEL:
        return SAME
    return BETTER if row["difference"] > 0 else WORSE


def against_best(paired: Paired, means: pd.Series) -> dict[str, ToBest]:
    """Every label of a setting, compared with the best one.

    The best one is only known from the scores, so any two labels could have been compared: see `differs_among`.
    """
    best = str(means.idxmax())
    differences, reasons = paired.differences_to(best)
    found = {best: ToBest(BEST)} | {label: ToBest(NOT_COMPARABLE, reason) for label, reason in reasons.items()}
    for label, compared in differences.items():
        if compared.why_untested:
            found[label] = ToBest(NO_VERDICT, compared.why_untested, compared.seeds)
        else:  # at the seeds that they share, the best one can be the lower one
            worse = compared.estimate < 0 and compared.differs_among(len(paired.runs))
            found[label] = ToBest(WORSE if worse else TIED, seeds=compared.seeds)
    return found


def shares_of_classes(paired: Paired, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per class for every comparison in `rows`."""
    found = []
    for row in rows:
        shares = paired.shares(row["label"], row["reference"]) if row["seeds"] else None
        if shares is None:
            continue
        keys = {name: row[name] for name in ("setting", "setting_name", "reference", "label")}
        found += [{**keys, "index": index, "name": name, "share": float(share)}
                  for index, (name, share) in enumerate(zip(paired.class_names, shares, strict=True))]  # fmt: skip
    return found


def power_of(paired: Paired, reference: str) -> list[dict[str, Any]]:
    """How many seeds it takes to distinguish half a point, and a point, from zero, given the observed variances."""
    differences = list(paired.differences_to(reference)[0].values()) if reference in paired.runs else []
    seen = Variances.of(differences)
    if seen is None:
        return []
    return [{"setting": paired.setting, "setting_name": paired.setting_name, "reference": reference,
             "comparisons": len(differences), "seed_deviation": math.sqrt(seen.of_seeds),
             "image_deviation": math.sqrt(seen.of_images), "groups": seen.groups,
             "for_half_a_point": seen.needed(0.005), "for_a_point": seen.needed(0.01)}]  # fmt: skip
