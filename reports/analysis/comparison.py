"""Compares methods: the frames behind tables, plots and page."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from harness.errors import UserError, did_you_mean
from harness.runs.result import COSTS, METRICS, about_only_found
from harness.runs.state import RunState
from reports.analysis import statistics
from reports.analysis.paired import (
    Paired,
    Size,
    ToBest,
    against_best,
    against_reference,
    power_of,
    shares_of_classes,
)
from reports.read.collect import Collected
from reports.read.frames import FACETS

AXES = {
    "backbone": ["backbone", "weights"],
    "head": ["head"],
    "dataset": ["dataset", "data_digest"],
    "budget": ["budget", "budget_steps", "budget_digest"],
}
"""What two settings can differ in, and the facets of each."""

_OF_CELL = ["method", "hyperparameters", "method_code", *(facet for facet in FACETS if facet not in ("budget", "part"))]
"""Equal for a run that is reported and one on the dev part with the same hyperparameters."""


@dataclass(frozen=True)
class Comparison:
    """The methods of a report compared in one metric. Every frame is sorted and has plain columns."""

    metric: str
    """In words: "mIoU", "IoU of water"."""
    runs: pd.DataFrame
    """The reported rows of `Collected.runs`, with the metric as `value`."""
    summary: pd.DataFrame
    """One row per setting and label: seeds (done), planned, mean, std (NaN for one seed), the means of `COSTS`,
    share (of the backbone's parameters), best, second, groups (of test images; 0 if unknown), rare_classes,
    to_best, to_best_reason and to_best_seeds (see `against_best`; empty without a score), unlabelled (the classes
    without a label in the test images, as text) and warnings."""
    images: pd.DataFrame
    """One row per setting, label and test image: miou of the image alone, mean over seeds."""
    significance: pd.DataFrame
    """One row per setting, reference and label: seeds, images, groups, rare_classes, groups_known, difference, low,
    high, seed_variance, image_variance, detectable, p, p_holm, verdict, reason."""
    shares: pd.DataFrame
    """One row per comparison of `significance` and class: index, name, share (in units of the score)."""
    power: pd.DataFrame
    """One row per setting and reference that has verdicts: comparisons, seed_deviation, image_deviation, groups,
    for_half_a_point, for_a_point (see `Variances.needed`)."""
    dev_test: pd.DataFrame
    """One row per setting and label that was also run on the dev part: dev, dev_runs, test, test_runs, doubts, and the
    setting's tau between the two (NaN for fewer than three labels)."""
    overall: pd.DataFrame
    """One row per label that is done in every setting: settings, and rank, wins, improvability and elo, each with low
    and high. Empty for one setting."""
    agreement: pd.DataFrame
    """One row per pair of settings that differ in one of `AXES`: varied, one, other, methods, tau (Kendall's)."""

    def about_labels(self, setting: str) -> Iterator[str]:
        """A sentence if there are classes without a label in the test images of a setting: it concerns every score."""
        names = self.summary.loc[self.summary["setting"] == setting, "unlabelled"].max()
        if names:
            yield about_unlabelled(names)


def compare(collected: Collected, metric: str = "miou", references: Sequence[str] = ("linear", "full")) -> Comparison:
    """Every statistic of a report. A setting without a reference has no comparison with it.

    `metric` is one of `METRICS` or `class:NAME`. Raises `UserError` for another, or a class that no run has.
    """
    everything, by_index = _with_values(collected, metric)
    runs = everything[everything["part"] == "report"]
    done = runs[(runs["state"] == RunState.DONE) & runs["value"].notna()]
    summary = _summary(runs, done)
    to_best: dict[tuple[str, str], ToBest] = {}
    sizes: dict[tuple[str, str], Size] = {}
    rows: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    shares: list[dict[str, Any]] = []
    power: list[dict[str, Any]] = []
    for (_, setting), here in done.groupby(["setting_name", "setting"]):
        paired = Paired(collected, here, by_index)
        compared_with_best = against_best(paired, here.groupby("label")["value"].mean())
        to_best |= {(setting, label): found for label, found in compared_with_best.items()}
        sizes |= {(setting, label): paired.size(label) for label in paired.runs}
        images += paired.image_scores()
        for reference in references:
            compared = against_reference(paired, reference)
            rows += compared
            shares += shares_of_classes(paired, compared)
            power += power_of(paired, reference)
    cells = list(zip(summary["setting"], summary["label"], strict=True))
    of_best, of_size = list(map(to_best.get, cells)), list(map(sizes.get, cells))
    summary["groups"] = [one.groups if one else 0 for one in of_size]
    summary["rare_classes"] = [one.rare_classes if one else 0 for one in of_size]
    summary["to_best"] = [one.verdict if one else "" for one in of_best]
    summary["to_best_reason"] = [one.reason if one else "" for one in of_best]
    summary["to_best_seeds"] = [one.seeds if one else 0 for one in of_best]
    keys = ["setting", "setting_name", "reference"]
    return Comparison(
        metric=METRICS[metric].title if metric in METRICS else f"IoU of {metric.removeprefix('class:')}",
        runs=runs,
        summary=summary,
        images=_frame(images, ["setting", "label", "image", "miou"]),
        significance=_frame(rows, [*keys, "label", "method", "seeds", "images", "groups", "rare_classes",
                                   "groups_known", "difference", "low", "high", "seed_variance",
                                   "image_variance", "detectable", "p", "p_holm", "verdict",
                                   "reason"]),
        shares=_frame(shares, [*keys, "label", "index", "name", "share"]),
        power=_frame(power, [*keys, "comparisons", "seed_deviation", "image_deviation", "groups",
                             "for_half_a_point", "for_a_point"]),
        dev_test=_dev_test(everything[everything["part"] == "dev"], done),
        overall=_overall(summary, references),
        agreement=_agreement(summary),
    )  # fmt: skip


def about_unlabelled(names: str) -> str:
    """What is wrong with a score if the test images have no label of these classes."""
    return (
        f"The test images have no label of {names}: such a class has IoU 0 if it is predicted, and is left out of the "
        "mean if not."
    )


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
    """All runs with their score as `value`; the metric as `difference.score` takes it, a class by run."""
    check_metric(collected, metric)
    runs = collected.runs
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
        **{name: runs.groupby(keys)[name].max() for name in ("unlabelled", "warnings")},
        only_found=done.groupby(keys)["only_found"].agg(lambda found: about_only_found(list(found))),
        **{cost: done.groupby(keys)[cost].mean().astype(float) for cost in COSTS},
    )
    summary["only_found"] = summary["only_found"].fillna("")
    summary["share"] = summary["trained_method"] / summary["backbone_parameters"]
    order = summary.groupby("setting")["mean"].rank(ascending=False, method="min")
    summary["best"], summary["second"] = order == 1, order == 2
    return summary.reset_index().sort_values(["setting_name", *keys], ignore_index=True)


def _dev_test(dev: pd.DataFrame, done: pd.DataFrame) -> pd.DataFrame:
    """The scores of reported rows on the dev part, from the trials with the same hyperparameters."""
    on_dev = dev[(dev["state"] == RunState.DONE) & dev["value"].notna()].groupby(_OF_CELL)["value"]
    of_dev = on_dev.agg(dev="mean", dev_runs="size").reset_index()
    of_test = done.groupby(["setting_name", "setting", "label", *_OF_CELL])
    of_test = of_test.agg(test=("value", "mean"), test_runs=("value", "size"), doubts=("doubts", "first"))
    both = of_test.reset_index().merge(of_dev, on=_OF_CELL)
    both["tau"] = float("nan")
    for _, here in both.groupby("setting"):
        if len(here) > 2:
            both.loc[here.index, "tau"] = statistics.kendall_tau(list(here["dev"]), list(here["test"]))
    columns = ["setting", "setting_name", "label", "method", "dev", "dev_runs", "test", "test_runs", "doubts", "tau"]
    return both.sort_values(["setting_name", "setting", "label"], ignore_index=True)[columns]


def _overall(summary: pd.DataFrame, references: Sequence[str]) -> pd.DataFrame:
    scores = statistics.complete(summary)
    rows: list[dict[str, Any]] = []
    if min(scores.shape) > 1:
        labels = list(scores.columns)
        reference = next((labels.index(name) for name in references if name in labels), 0)
        found = {
            "rank": statistics.over_settings(statistics.mean_ranks, scores.to_numpy()),
            "wins": statistics.over_settings(statistics.win_rates, scores.to_numpy()),
            "improvability": statistics.over_settings(statistics.improvability, scores.to_numpy()),
            "elo": statistics.over_settings(partial(statistics.elo, reference=reference), scores.to_numpy()),
        }
        for number, label in enumerate(labels):
            row = {"label": label, "settings": len(scores), "elo_reference": labels[reference]}
            for name, intervals in found.items():
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), intervals[number], strict=True))
            rows.append(row)
    columns = [name + end for name in ("rank", "wins", "improvability", "elo") for end in ("", "_low", "_high")]
    frame = _frame(rows, ["label", "settings", *columns, "elo_reference"])
    return frame.sort_values(["rank", "label"], ignore_index=True)


def _agreement(summary: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for varied, facets in AXES.items():
        shared = [facet for facet in FACETS if facet not in facets]
        for _, here in summary.dropna(subset="mean").groupby(shared, dropna=False):
            blocks = [(name, group.set_index("label")["mean"]) for name, group in here.groupby("setting_name")]
            for (one, x), (other, y) in itertools.combinations(blocks, 2):
                labels = sorted(x.index.intersection(y.index))
                if len(labels) > 2:
                    tau = statistics.kendall_tau(x[labels], y[labels])
                    rows.append({"varied": varied, "one": one, "other": other, "methods": len(labels), "tau": tau})
    return _frame(rows, ["varied", "one", "other", "methods", "tau"])


def _frame(rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns)
