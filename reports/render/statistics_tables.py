"""The tables of a report's statistics: verdicts, shares of classes, dev against test, and over all settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from harness.runs.difference import FEW_GROUPS, POWER, RARE
from harness.util.text import counted
from reports.analysis.comparison import Comparison
from reports.analysis.paired import BETTER, SAME, WORSE
from reports.analysis.statistics import SETTINGS
from reports.read.frames import rows_of
from reports.render.formats import Footnotes, Mark, Table, TableCell
from reports.render.numbers import DASH, NumberFormat


def significance_tables(comparison: Comparison, numbers: NumberFormat) -> list[Table]:
    """One table per setting and reference: every method's difference to it, and the verdict."""
    tables = []
    power = {(row.setting, row.reference): row for row in rows_of(comparison.power)}
    groups = comparison.significance.groupby(["setting_name", "setting", "reference"], sort=False)
    for number, ((name, setting, reference), rows) in enumerate(groups, 1):
        footnotes = Footnotes()
        rows = rows.fillna({"reason": ""}).sort_values(["difference", "label"], ascending=[False, True])
        cells = [
            [
                TableCell(row.label, "text"),
                TableCell(numbers.difference(row.difference)),
                TableCell(_between(row.low, row.high, numbers.difference)),
                TableCell(numbers.p(row.p)),
                TableCell(numbers.p(row.p_holm)),
                TableCell(numbers.score(row.detectable)),
                TableCell(str(row.seeds)),
                TableCell(
                    row.verdict, "text", _MARKS.get(row.verdict), footnotes.letter(row.reason) if row.reason else ""
                ),
            ]
            for row in rows_of(rows)
        ]
        difference = f"difference, {comparison.metric}{numbers.difference_unit}"
        header = ["method", difference, "95 % interval", "p", "p (Holm)", "detectable", "seeds", "verdict"]
        sentences = [*_about_verdicts(rows), *_about_power(power.get((setting, reference)))]
        sentences += comparison.about_labels(setting)
        title = f"{name}: compared with {reference}"
        tables.append(Table(f"against-{number}", title, header, cells, " ".join(sentences), footnotes.lines()))
    return tables


_MARKS: dict[str, Mark] = {BETTER: "better", WORSE: "worse", SAME: "same"}


def _about_verdicts(rows: pd.DataFrame) -> Iterator[str]:
    """How the verdicts of a table were reached, and their limits."""
    tested = rows[rows["p"].notna()]
    if len(tested):
        yield (
            "Mean difference at equal seeds. Interval and p: Student's t, with the variance over seeds (no less "
            "than the median of this table) and over groups "
            f"of images. p (Holm): corrected for the {len(tested)} methods of this table; better and worse need one "
            f"below 0.05. Detectable: the true difference that is found with a probability of {POWER:g}, before this "
            "correction."
        )
    compared = rows[rows["seeds"] > 0]
    if len(compared):
        images, groups = int(compared["images"].max()), int(compared["groups"].min())
        yield f"Test images: {images} in {counted(groups, 'group')}."
        if not compared["groups_known"].all():
            yield "Some runs do not record groups: each of their images counts as one, and intervals may be too narrow."
        if groups < FEW_GROUPS:
            yield f"With fewer than {FEW_GROUPS} groups, the variance over images is poorly estimated."
        rare = int(compared["rare_classes"].max())
        if rare:
            yield (
                f"{counted(rare, 'class', 'classes')} labelled in fewer than {RARE} groups: verdicts are wrong more "
                "often than the nominal 5 %."
            )
    if (rows["seeds"] == 1).any():
        yield "One seed shows how these trained networks differ, not how the methods do: there is no verdict."
    if (tested["seeds"] == 2).any():
        yield "Of two equal methods with two seeds, one is called better in up to 12 % of comparisons: use more."


def _about_power(row: Any) -> Iterator[str]:
    """How many seeds would have been enough."""
    if row is None:
        return
    yield (
        f"Needed to find a true difference with a probability of {POWER:g}, by the variances of this table and before "
        f"Holm's correction: 1 point: {row.for_a_point}; 0.5 points: {row.for_half_a_point}."
    )


CLASSES = 12
"""The largest number of classes in a table of their shares."""


def share_tables(comparison: Comparison, numbers: NumberFormat) -> list[Table]:
    """One table per setting and reference: what each class adds to the difference of every method."""
    tables = []
    groups = comparison.shares.groupby(["setting_name", "reference", "setting"], sort=False)
    for number, ((name, reference, setting), rows) in enumerate(groups, 1):
        shares = rows.pivot(index="label", columns="index", values="share")
        names = rows.drop_duplicates("index").set_index("index")["name"]
        largest = shares.abs().max().sort_values(ascending=False, kind="stable").index[:CLASSES]
        shown = sorted(largest)
        total = shares.sum(axis="columns")
        rest = total - shares[shown].sum(axis="columns")
        others = len(shares.columns) - len(shown)
        order = total.sort_values(ascending=False, kind="stable").index
        cells = [
            [
                TableCell(label, "text"),
                TableCell(numbers.difference(total[label])),
                *(TableCell(numbers.difference(shares.loc[label, index])) for index in shown),
                *([TableCell(numbers.difference(rest[label]))] if others else []),
            ]
            for label in order
        ]
        header = ["method", "difference", *(names[index] for index in shown)]
        header += [f"{others} others"] if others else []
        caption = (
            f"What each class adds to the difference in {comparison.metric}{numbers.difference_unit}, mean over seeds: "
            "a class adds its own score, divided by the number of classes that have one with that method. The shares "
            "add up to the difference."
        )
        caption = " ".join([caption, *comparison.about_labels(setting)])
        tables.append(Table(f"classes-{number}", f"{name}: compared with {reference}", header, cells, caption))
    return tables


def dev_test_tables(comparison: Comparison, numbers: NumberFormat) -> list[Table]:
    """One table per setting: the score of each tuned method on the dev part and on the test part."""
    tables = []
    groups = comparison.dev_test.groupby(["setting_name", "setting"], sort=False)
    for number, ((name, setting), rows) in enumerate(groups, 1):
        footnotes = Footnotes()
        cells = [
            [
                TableCell(row.label, "text",
                          notes=footnotes.letter(f"about its search: {row.doubts}") if row.doubts else ""),
                TableCell(numbers.score(row.dev)), TableCell(str(row.dev_runs)),
                TableCell(numbers.score(row.test),
                          notes=",".join(map(footnotes.letter, comparison.about_labels(setting)))),
                TableCell(str(row.test_runs)),
            ]
            for row in rows_of(rows.sort_values(["dev", "label"], ascending=[False, True]))
        ]  # fmt: skip
        score = f"{comparison.metric}{numbers.score_unit}"
        header = ["method", f"dev, {score}", "dev runs", f"test, {score}", "test runs"]
        tau = rows["tau"].iloc[0]
        order = "" if math.isnan(tau) else f"Kendall's τ between the two orders: {numbers.plain(tau)}. "
        caption = (
            f"{order}Dev: the trial that was chosen, so its score is the best of several and too high. The runs "
            "that are tested use its hyperparameters, and train on more where dev is held out of train."
        )
        tables.append(Table(f"dev-test-{number}", name, header, cells, caption, footnotes.lines()))
    return tables


def overall_tables(comparison: Comparison, numbers: NumberFormat) -> list[Table]:
    """Over all settings: mean rank, win rate, improvability and Elo, and how far settings agree."""
    overall = [
        [TableCell(row.label, "text"),
         *_with_interval(row.rank, row.rank_low, row.rank_high, numbers.plain),
         *_with_interval(row.wins, row.wins_low, row.wins_high, numbers.percent),
         *_with_interval(row.improvability, row.improvability_low, row.improvability_high, numbers.percent),
         *_with_interval(row.elo, row.elo_low, row.elo_high, numbers.whole)]
        for row in rows_of(comparison.overall)
    ]  # fmt: skip
    agreement = [
        [TableCell(row.varied, "text"), TableCell(row.one, "text"), TableCell(row.other, "text"),
         TableCell(str(row.methods)), TableCell(numbers.plain(row.tau))]
        for row in rows_of(comparison.agreement)
    ]  # fmt: skip
    tables = []
    if overall:
        settings, reference = comparison.overall[["settings", "elo_reference"]].iloc[0]
        warning = (
            f"Fewer than {SETTINGS} settings do not generalise: these numbers describe them and no others."
            if settings < SETTINGS
            else "Intervals (95 %) resample settings; they are too narrow where settings share a dataset or a backbone."
        )
        tables.append(
            Table(
                "overall",
                f"Over {settings} settings",
                ["method", "mean rank", "interval", "win rate, %", "interval", "improvability, %", "interval", "Elo",
                 "interval"],
                overall,
                f"{warning} Methods with a score in all settings, by their means over seeds; rank 1 is best. Win rate: "
                "share of comparisons with the other methods that are won. Improvability: how far the error "
                "(1 − score) of the best method of a setting is below the method's own, mean over settings. "
                f"Elo: 400 points are odds of 10 to 1; {reference} has 1000. "
                "After TabArena, arXiv 2506.16791; Elo has a standard normal prior.",
            )
        )  # fmt: skip
    if agreement:
        tables.append(
            Table(
                "agreement", "Agreement of settings that differ in one thing",
                ["they differ in", "setting", "other setting", "methods", "Kendall's τ"], agreement,
                "1: the methods have the same order in both settings; 0: unrelated orders; −1: the reverse order.",
            )
        )  # fmt: skip
    return tables


def _with_interval(value: float, low: float, high: float, write: Callable[[float], str]) -> list[TableCell]:
    return [TableCell(write(value)), TableCell(_between(low, high, write))]


def _between(low: float, high: float, write: Callable[[float], str]) -> str:
    return DASH if math.isnan(low) else f"{write(low)} to {write(high)}"
