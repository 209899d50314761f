"""Compares methods: the frames behind tables, plots and page. The statistics themselves are in `statistics.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from harness.errors import UserError, did_you_mean
from harness.runs.result import COSTS, METRICS
from harness.runs.state import RunState
from reports.analysis import statistics
from reports.analysis.statistics import Interval, Resampled
from reports.read.collect import Collected
from reports.read.frames import FACETS, rows_of


@dataclass(frozen=True)
class Comparison:
    """The methods of a report compared in one metric. Every frame is sorted and has plain columns."""

    metric: str
    """In words: "mIoU", "IoU of water"."""
    runs: pd.DataFrame
    """The reported rows of `Collected.runs`, with the metric as `value`."""
    summary: pd.DataFrame
    """One row per setting and label: seeds (done), planned, mean, std (NaN for one seed), the means of `COSTS`,
    share (of the backbone's parameters), best, second, tied (its paired interval to the best contains 0)."""
    significance: pd.DataFrame
    """One row per setting, reference and label: seeds, images, difference, low, high, p, p_holm, verdict, reason."""
    improvement: pd.DataFrame
    """One row per reference and label, over all settings where both are done: settings, runs, probability and iqm (of
    the difference, seed by seed), each with low and high."""
    averages: pd.DataFrame
    """One row per label that is done in every setting: settings, iqm with low and high, mean_rank."""
    stability: pd.DataFrame
    """One row per pair of settings that differ in the backbone: methods, tau (Kendall's, of the methods' orders)."""


def compare(collected: Collected, metric: str = "miou", references: Sequence[str] = ("linear", "full")) -> Comparison:
    """Every statistic of a report. A setting without a reference has no comparison with it.

    `metric` is one of `METRICS` or `class:NAME`. Raises `UserError` for another, or a class that no run has.
    """
    runs, by_index = _with_values(collected, metric)
    done = runs[(runs["state"] == RunState.DONE) & runs["value"].notna()]
    summary = _summary(runs, done)
    ties: dict[tuple[str, str], bool] = {}
    rows: list[dict[str, Any]] = []
    for (_, setting), here in done.groupby(["setting_name", "setting"]):
        paired = _Paired(collected, here, by_index)
        ties |= {(setting, label): tied for label, tied in _ties(paired, summary[summary["setting"] == setting])}
        for reference in references:
            rows += _compared_with(paired, reference)
    summary["tied"] = [ties.get((row.setting, row.label), False) for row in rows_of(summary)]
    scores = {key: group.set_index("seed")["value"] for key, group in done.groupby(["setting", "label"])}
    return Comparison(
        metric=METRICS[metric].title if metric in METRICS else f"IoU of {metric.removeprefix('class:')}",
        runs=runs,
        summary=summary,
        significance=_frame(rows, ["setting", "setting_name", "reference", "label", "method", "seeds", "images",
                                   "difference", "low", "high", "p", "p_holm", "verdict", "reason"]),
        improvement=_improvement(scores, references),
        averages=_averages(scores, summary),
        stability=_stability(summary),
    )  # fmt: skip


def check_metric(collected: Collected, metric: str) -> None:
    """Raises `UserError` for an unknown metric, or a class that no run has."""
    kind, colon, name = metric.partition(":")
    if kind == "class" and colon:
        names = set(collected.per_class["name"])
        if name not in names:
            raise UserError(f"--metric {metric}: no run has such a class; {did_you_mean(name, names)}")
    elif metric not in METRICS:
        raise UserError(f"--metric {metric}: no such metric; {did_you_mean(metric, [*METRICS, 'class:NAME'])}")


def _with_values(collected: Collected, metric: str) -> tuple[pd.DataFrame, dict[str, int] | str]:
    """The reported runs with their score as `value`; the metric as `statistics.score` takes it, a class by run."""
    check_metric(collected, metric)
    runs = collected.reported.copy()
    if metric in METRICS:
        return runs.assign(value=runs[metric]), metric
    rows = collected.per_class[collected.per_class["name"] == metric.removeprefix("class:")]
    rows = rows.drop_duplicates("fingerprint").set_index("fingerprint")
    return runs.assign(value=runs["fingerprint"].map(rows["iou"])), rows["index"].to_dict()


def _summary(runs: pd.DataFrame, done: pd.DataFrame) -> pd.DataFrame:
    keys = ["setting", "label"]
    first = runs.groupby(keys)[["setting_name", "method", *FACETS]].first()
    values = done.groupby(keys)["value"]
    summary = first.assign(
        seeds=values.count().reindex(first.index, fill_value=0),
        planned=runs.groupby(keys).size(),
        mean=values.mean(),
        std=values.std(ddof=1),
        **{cost: done.groupby(keys)[cost].mean().astype(float) for cost in COSTS},
    )
    summary["share"] = summary["trained_method"] / summary["backbone_parameters"]
    order = summary.groupby("setting")["mean"].rank(ascending=False, method="min")
    summary["best"], summary["second"] = order == 1, order == 2
    return summary.reset_index().sort_values(["setting_name", *keys], ignore_index=True)


class _Paired:
    """The done runs of one setting, with their counts and resamples, each read and computed once."""

    def __init__(self, collected: Collected, runs: pd.DataFrame, metric: dict[str, int] | str):
        self.setting = runs["setting"].iloc[0]
        self.setting_name = runs["setting_name"].iloc[0]
        self.methods = dict(zip(runs["label"], runs["method"], strict=True))
        self.runs = {label: dict(zip(group["seed"], group["fingerprint"], strict=True))
                     for label, group in runs.groupby("label")}  # fmt: skip
        self._collected, self._metric = collected, metric
        self._counts: dict[str, tuple[list[str], np.ndarray]] = {}
        self._resampled: dict[str, Resampled] = {}

    def metric(self, fingerprint: str) -> str | int:
        return self._metric if isinstance(self._metric, str) else self._metric[fingerprint]

    def counts(self, fingerprint: str) -> tuple[list[str], np.ndarray]:
        if fingerprint not in self._counts:
            self._counts[fingerprint] = self._collected.counts(fingerprint)
        return self._counts[fingerprint]

    def resampled(self, fingerprint: str) -> Resampled:
        if fingerprint not in self._resampled:
            _, counts = self.counts(fingerprint)
            self._resampled[fingerprint] = statistics.resample_images(counts, self.metric(fingerprint))
        return self._resampled[fingerprint]

    def seeds(self, a: str, b: str) -> list[tuple[str, str]]:
        """The pairs of runs of two labels that share a seed. Raises `UserError` if they cannot be compared."""
        pairs = [(self.runs[a][seed], self.runs[b][seed]) for seed in sorted(self.runs[a].keys() & self.runs[b].keys())]
        if not pairs:
            raise UserError("no seed in common")
        names, counts = self.counts(pairs[0][0])
        for fingerprint in itertools.chain(*pairs):
            if self.counts(fingerprint)[0] != names or self.counts(fingerprint)[1].shape != counts.shape:
                raise UserError(f"run {fingerprint} was evaluated on other images")
        return pairs

    def difference(self, pairs: Sequence[tuple[str, str]]) -> Interval:
        a, b = ([self.resampled(run) for run in side] for side in zip(*pairs, strict=True))
        return statistics.difference(a, b)

    def p(self, pairs: Sequence[tuple[str, str]]) -> float:
        a, b = (np.stack([self.counts(run)[1] for run in side]) for side in zip(*pairs, strict=True))
        return statistics.paired_permutation_test(a, b, self.metric(pairs[0][0]))


def _ties(paired: _Paired, summary: pd.DataFrame) -> Iterator[tuple[str, bool]]:
    """For each label but the best: whether its paired interval to the best contains 0."""
    for best in summary["label"][summary["best"]].head(1):
        for label in paired.runs.keys() - {best}:
            try:
                yield label, paired.difference(paired.seeds(label, best)).contains_zero
            except UserError:
                yield label, False


def _compared_with(paired: _Paired, reference: str) -> list[dict[str, Any]]:
    """Every other label of a setting, compared with the reference. Holm corrects for them together."""
    if reference not in paired.runs:
        return []
    rows = []
    for label in sorted(paired.runs.keys() - {reference}):
        row: dict[str, Any] = {
            "setting": paired.setting,
            "setting_name": paired.setting_name,
            "reference": reference,
            "label": label,
            "method": paired.methods[label],
        }
        try:
            pairs = paired.seeds(label, reference)
            interval, images = paired.difference(pairs), len(paired.counts(pairs[0][0])[0])
            row |= {"seeds": len(pairs), "images": images, "difference": interval.estimate, "low": interval.low,
                    "high": interval.high, "p": paired.p(pairs), "reason": None}  # fmt: skip
        except UserError as error:
            row |= {"seeds": 0, "images": 0, "difference": np.nan, "low": np.nan, "high": np.nan, "p": np.nan,
                    "reason": str(error)}  # fmt: skip
        rows.append(row)
    for row, p in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        row |= {"p_holm": float(p), "verdict": _verdict(row["low"], row["high"], p)}
    return rows


def _verdict(low: float, high: float, p: float) -> str:
    """A difference is significant if both the interval and the corrected test show it."""
    if np.isnan(p):
        return "not comparable"
    if p < 1 - statistics.LEVEL and low > 0:
        return "better"
    if p < 1 - statistics.LEVEL and high < 0:
        return "worse"
    return "no significant difference"


Scores = dict[tuple[str, str], pd.Series]
"""By setting and label: the score of each seed."""


def _improvement(scores: Scores, references: Sequence[str]) -> pd.DataFrame:
    rows = []
    for reference, label in itertools.product(references, sorted({label for _, label in scores})):
        shared = sorted(setting for setting, other in scores if other == label and (setting, reference) in scores)
        if label == reference or not shared:
            continue
        own, base = ([scores[setting, name] for setting in shared] for name in (label, reference))
        probability = statistics.probability_of_improvement(own, base)
        paired = [(x - y).dropna() for x, y in zip(own, base, strict=True)]
        paired = [difference for difference in paired if len(difference)]
        iqm = statistics.iqm_interval(paired) if paired else Interval(np.nan, np.nan, np.nan)
        rows.append(
            {"reference": reference, "label": label, "settings": len(shared), "runs": sum(map(len, paired)),
             "probability": probability.estimate, "probability_low": probability.low,
             "probability_high": probability.high, "iqm": iqm.estimate, "iqm_low": iqm.low, "iqm_high": iqm.high}
        )  # fmt: skip
    return _frame(rows, ["reference", "label", "settings", "runs", "probability", "probability_low",
                         "probability_high", "iqm", "iqm_low", "iqm_high"])  # fmt: skip


def _averages(scores: Scores, summary: pd.DataFrame) -> pd.DataFrame:
    complete = _complete(summary)
    ranked = statistics.ranks(complete).mean()
    rows = []
    for label in complete.columns if len(complete) else ():
        iqm = statistics.iqm_interval([scores[setting, label] for setting in complete.index])
        rows.append({"label": label, "settings": len(complete), "iqm": iqm.estimate, "iqm_low": iqm.low,
                     "iqm_high": iqm.high, "mean_rank": ranked[label]})  # fmt: skip
    frame = _frame(rows, ["label", "settings", "iqm", "iqm_low", "iqm_high", "mean_rank"])
    return frame.sort_values(["mean_rank", "label"], ignore_index=True)


def _complete(summary: pd.DataFrame) -> pd.DataFrame:
    """Means: the settings in which any label is done × the labels that are done in each of those."""
    return (
        summary.pivot(index="setting", columns="label", values="mean")
        .dropna(axis="index", how="all")
        .dropna(axis="columns")
    )


def _stability(summary: pd.DataFrame) -> pd.DataFrame:
    shared = [facet for facet in FACETS if facet not in ("backbone", "weights", "budget")]
    rows = []
    for _, here in summary.dropna(subset="mean").groupby(shared, dropna=False):
        blocks = [(group.iloc[0], group.set_index("label")["mean"]) for _, group in here.groupby("setting_name")]
        for (one, x), (other, y) in itertools.combinations(blocks, 2):
            labels = sorted(x.index.intersection(y.index))
            if len(labels) < 2:
                continue
            rows.append({"dataset": one.dataset, "head": one["head"], "budget": one.budget, "one": one.setting_name,
                         "other": other.setting_name, "methods": len(labels),
                         "tau": statistics.kendall_tau(x[labels], y[labels])})  # fmt: skip
    return _frame(rows, ["dataset", "head", "budget", "one", "other", "methods", "tau"])


def _frame(rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns)
