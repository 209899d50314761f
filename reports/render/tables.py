"""The tables of a report: results as papers print them, verdicts, averages, published scores, runs without a score.

Nothing is computed here but means over datasets; `formats.py` writes the files.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd

from harness.errors import UserError, did_you_mean
from harness.runs.result import COSTS
from harness.runs.state import RunState
from reports.analysis.comparison import Comparison
from reports.read.frames import rows_of
from reports.read.rows import state_label
from reports.render.formats import Mark, Table, TableCell
from reports.render.numbers import DASH, SIZES, UNITS, NumberFormat

TIED = "≈"


@dataclass(frozen=True)
class CostColumn:
    """A column with a cost."""

    key: str
    """In `Comparison.summary`."""
    name: str
    units: tuple[str, ...]
    """The possible units, the largest first."""

    def unit_for(self, values: pd.Series) -> str:
        """The largest unit of which the largest value has ten, or else the smallest."""
        return next((unit for unit in self.units if values.max() >= 10 * SIZES[unit]), self.units[-1])


def _cost_columns() -> Iterator[tuple[str, CostColumn]]:
    for measure in COSTS.values():
        if measure.column is not None:
            units = (measure.table_unit,) if measure.table_unit else UNITS[measure.unit]
            yield measure.column, CostColumn(measure.key, measure.column, units)
        if measure.key == "trained_head":
            yield "share", CostColumn("share", "of backbone", UNITS["share"])


COLUMNS = dict(_cost_columns())
"""The costs that `--columns` and `--sort` accept, in addition to `score`, `published` and `label`."""
CHOICES = ["score", *COLUMNS, "published"]
SORTS = ["score", "label", *COLUMNS]


@dataclass(frozen=True)
class TableLayout:
    """Which columns, in which order of rows."""

    columns: tuple[str, ...] = tuple(CHOICES)
    sort: str = "score"
    """One of `SORTS`, with a minus in reverse. `score` has the best first, a cost the lowest."""

    def __post_init__(self) -> None:
        for flag, names, known in (
            ("--columns", self.columns, CHOICES),
            ("--sort", [self.sort.removeprefix("-")], SORTS),
        ):
            for name in names:
                if name not in known:
                    raise UserError(f"{flag} {name}: no such column; {did_you_mean(name, known)}")


@dataclass
class Footnotes:
    """Texts by letter; equal texts share a letter."""

    texts: list[str] = field(default_factory=list)

    def letter(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        index, letters = self.texts.index(text), ""
        while index >= 0:
            index, letter = divmod(index, 26)
            letters, index = string.ascii_lowercase[letter] + letters, index - 1
        return letters

    def lines(self) -> list[str]:
        return [f"{self.letter(text)}: {text}" for text in self.texts]


def result_tables(
    comparison: Comparison, published: pd.DataFrame, layout: TableLayout, numbers: NumberFormat
) -> list[Table]:
    """One table a backbone with its weights, head and budget: methods are rows, datasets columns."""
    groups = comparison.summary.groupby(["backbone", "weights", "head", "budget_digest"], sort=True)
    blocks = [_Block(rows, comparison, published, numbers) for _, rows in groups]
    names = [block.name for block in blocks]
    return [
        Table(
            f"results-{number}",
            block.name if names.count(block.name) == 1 else block.full_name,
            ["method", *(header for header, _ in block.columns(layout.columns))],
            [
                [TableCell(label, "text"), *(cell(label) for _, cell in block.columns(layout.columns))]
                for label in block.labels(layout.sort)
            ],
            block.caption,
            block.footnotes.lines(),
        )
        for number, block in enumerate(blocks, 1)
    ]


class _Block:
    """The table of one backbone with its weights, head and budget, and its footnotes."""

    def __init__(self, rows: pd.DataFrame, comparison: Comparison, published: pd.DataFrame, numbers: NumberFormat):
        settings = rows.drop_duplicates("setting").sort_values(["dataset", "setting"])
        self.numbers, self.metric, self.footnotes = numbers, comparison.metric, Footnotes()
        self.datasets = dict(zip(settings["setting"], settings["dataset"], strict=True))
        if len(set(self.datasets.values())) < len(self.datasets):  # versions of one dataset's files
            self.datasets = {row.setting: f"{row.dataset} ({row.data_digest[:8]})" for row in rows_of(settings)}
        self.rows = {(row.setting, row.label): row for row in rows_of(rows)}
        self.runs = dict(list(comparison.runs.groupby(["setting", "label"])))
        measured = published[published["setting"].isin(set(self.datasets))].dropna(subset="measured_label")
        self.published = dict(list(measured.groupby(["setting", "measured_label"])))
        self.means = rows.groupby("label")[["mean", *(column.key for column in COLUMNS.values())]].mean()
        self.seeds = sorted(rows.loc[rows["seeds"] > 0, "seeds"].unique())
        first = rows.iloc[0]
        random = ", random weights" if first["weights"] == "random" else ""
        self.name = f"{first['backbone']}, {first['head']}, {first['budget']}{random}"
        self.full_name = f"{self.name}, weights {first['weights']}, budget {first['budget_digest'][:8]}"

    def labels(self, sort: str) -> list[str]:
        """In the order of the rows; labels without a value come last in either direction."""
        name = sort.removeprefix("-")
        ranks = pd.Series(range(len(self.means)), self.means.index, dtype=float)  # in the order of their labels
        if name != "label":
            ranks = -self.means["mean"] if name == "score" else self.means[COLUMNS[name].key]
        ranks = -ranks if sort.startswith("-") else ranks
        return sorted(ranks.index, key=lambda label: (math.isnan(ranks[label]), ranks[label], label))

    def columns(self, choices: Iterable[str]) -> Iterator[tuple[str, Callable[[str], TableCell]]]:
        """Heading, and the cell of a label."""
        for choice in choices:
            if choice == "score":
                for setting, dataset in self.datasets.items():
                    yield f"{dataset}, {self.metric}{self.numbers.score_unit}", partial(self._score, setting)
            elif choice == "published":
                for setting, dataset in self.datasets.items() if self.published else ():
                    yield f"{dataset}, published (difference)", partial(self._published, setting)
            else:
                yield self._cost_column(COLUMNS[choice])

    @property
    def caption(self) -> str:
        spread = {0: "No finished run", 1: "One seed"}.get(
            max(self.seeds, default=0),
            f"Mean ± standard deviation over {self.seeds[0] if len(self.seeds) == 1 else 'n'} seeds",
        )
        sentences = [
            spread,
            "best in bold, second underlined",
            f"{TIED}: the paired 95 % interval of the difference to the best contains 0",
            *(["costs are means over the datasets"] if len(self.datasets) > 1 else []),
        ]
        return "; ".join(sentences) + "."

    def _score(self, setting: str, label: str) -> TableCell:
        if (setting, label) not in self.rows:
            return TableCell(DASH)
        row, runs = self.rows[setting, label], self.runs[setting, label]
        undone = runs[runs["value"].isna()].fillna({"reason": ""})
        notes = sorted(
            self.footnotes.letter(_why(state, reason, group["seed"], of=len(runs)))
            for (state, reason), group in undone.groupby(["state", "reason"])
        )
        edges = sorted({text for text in runs["at_edge"] if text})
        notes += [self.footnotes.letter(f"at the edge of its search: {text} that was tried") for text in edges]
        if not row.seeds:
            states = [_state(state) for state in dict.fromkeys(undone["state"])]
            text = DASH if states == [RunState.UNSUPPORTED.label] else ", ".join(states)
            return TableCell(text, notes=",".join(notes))
        text = self.numbers.score(row.mean)
        text += f" ± {self.numbers.score(row.std)}" if row.seeds > 1 else ""
        text += f" (n = {row.seeds})" if len(self.seeds) > 1 else ""
        text += f" {TIED}" if row.tied else ""
        return TableCell(text, mark="best" if row.best else "second" if row.second else None, notes=",".join(notes))

    def _published(self, setting: str, label: str) -> TableCell:
        """All published scores of a method, each with its difference and its source as a footnote."""
        if (setting, label) not in self.published:
            return TableCell("")
        scores, notes = [], []
        for row in rows_of(self.published[setting, label]):
            known = not math.isnan(row.difference)
            scores.append(self.numbers.score(row.value)
                          + (f" ({self.numbers.difference(row.difference)})" if known else ""))  # fmt: skip
            source = f"published by {row.source} ({row.sure})" + (f"; {row.note}" if row.note else "")
            notes.append(self.footnotes.letter(source))
        return TableCell("; ".join(scores), notes=",".join(notes))

    def _cost_column(self, column: CostColumn) -> tuple[str, Callable[[str], TableCell]]:
        values = self.means[column.key]
        unit = column.unit_for(values)
        written = (values / SIZES[unit]).map(self.numbers.short)
        return f"{column.name}, {unit}", lambda label: TableCell(written[label])


def _state(name: str) -> str:
    """Of a run without a score; one that is done has none where every class is absent."""
    return "undefined" if name == RunState.DONE else state_label(name)


def _why(state: str, reason: str, seeds: Iterable[int], of: int) -> str:
    text = _state(state) + (f": {reason}" if reason else "")
    return f"seed {', '.join(map(str, sorted(seeds)))} {text}" if of > 1 and state != RunState.UNSUPPORTED else text


def significance_tables(comparison: Comparison, numbers: NumberFormat) -> list[Table]:
    """One table a setting and reference: every method's difference to it, and the verdict."""
    tables = []
    groups = comparison.significance.groupby(["setting_name", "setting", "reference"], sort=False)
    for number, ((setting, _, reference), rows) in enumerate(groups, 1):
        footnotes = Footnotes()
        rows = rows.fillna({"reason": ""}).sort_values(["difference", "label"], ascending=[False, True])
        cells = [
            [
                TableCell(row.label, "text"),
                TableCell(numbers.difference(row.difference)),
                TableCell(_between(row.low, row.high, numbers.difference)),
                TableCell(numbers.p(row.p)),
                TableCell(numbers.p(row.p_holm)),
                TableCell(str(row.seeds)),
                TableCell(
                    row.verdict, "text", _MARKS.get(row.verdict), footnotes.letter(row.reason) if row.reason else ""
                ),
            ]
            for row in rows_of(rows)
        ]
        difference = f"difference, {comparison.metric}{numbers.difference_unit}"
        header = ["method", difference, "95 % interval", "p", "p (Holm)", "seeds", "verdict"]
        caption = (
            "Intervals: paired bootstrap over images and seeds. p: paired permutation test over images; p (Holm): "
            f"corrected for the {len(rows)} methods of this table. Better and worse need an interval without 0 and "
            "p (Holm) < 0.05."
        )
        if (rows["seeds"] == 1).any():
            caption += " With one seed, a verdict holds for these trained networks, not for the methods."
        tables.append(
            Table(
                f"against-{number}", f"{setting}: compared with {reference}", header, cells, caption, footnotes.lines()
            )
        )
    return tables


_MARKS: dict[str, Mark] = {"better": "better", "worse": "worse", "no significant difference": "same"}


def overall_tables(comparison: Comparison, numbers: NumberFormat) -> list[Table]:
    """Over all settings: ranks and IQM, probability of improvement, and Kendall's τ between backbones."""
    averages = [
        [TableCell(row.label, "text"), TableCell(numbers.plain(row.mean_rank)), TableCell(numbers.score(row.iqm)),
         TableCell(_between(row.iqm_low, row.iqm_high, numbers.score))]
        for row in rows_of(comparison.averages)
    ]  # fmt: skip
    improvement = [
        [TableCell(row.label, "text"), TableCell(row.reference, "text"), TableCell(str(row.settings)),
         TableCell(str(row.runs)),
         TableCell(numbers.plain(row.probability)),
         TableCell(_between(row.probability_low, row.probability_high, numbers.plain)),
         TableCell(numbers.difference(row.iqm)), TableCell(_between(row.iqm_low, row.iqm_high, numbers.difference))]
        for row in rows_of(comparison.improvement)
    ]  # fmt: skip
    stability = [
        [TableCell(row.one, "text"), TableCell(row.other, "text"), TableCell(str(row.methods)),
         TableCell(numbers.plain(row.tau))]
        for row in rows_of(comparison.stability)
    ]  # fmt: skip
    settings = comparison.averages["settings"].max()
    tables = [
        Table(
            "overall", "Mean rank and IQM", ["method", "mean rank", f"IQM, {comparison.metric}{numbers.score_unit}",
                                             "95 % interval"], averages,
            f"Methods with a score in all {settings} settings that have one; rank 1 is best. IQM: interquartile mean, "
            "the mean of the middle half of all runs. Intervals resample settings and seeds, and are too narrow where "
            "there are few of them.",
        ),
        Table(
            "improvement", "Probability of improvement",
            ["method", "reference", "settings", "runs", "probability", "95 % interval",
             f"IQM of the difference, {comparison.metric}{numbers.difference_unit}", "95 % interval"], improvement,
            "The probability that a run of the method scores higher than a run of the reference in a random setting; "
            "at 0.5 neither is better. Intervals resample settings and seeds, and are too narrow where there are few "
            "of them.",
        ),
        Table(
            "stability", "Kendall's τ between backbones", ["setting", "other setting", "methods", "τ"],
            stability, "1: the methods have the same order in both settings; −1: the reverse order.",
        ),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _between(low: float, high: float, write: Callable[[float], str]) -> str:
    return DASH if math.isnan(low) else f"{write(low)} to {write(high)}"


def published_table(published: pd.DataFrame, metric: str, numbers: NumberFormat) -> list[Table]:
    """Every published score that belongs to a setting of the report, with the score measured there."""
    header = ["setting", "method", f"published, {metric}{numbers.score_unit}", "trained, M", "head counted", "measured",
              "difference", "source", "certainty"]  # fmt: skip
    rows = [
        [TableCell(row.setting_name, "text"), TableCell(row.label, "text"), TableCell(numbers.score(row.value)),
         TableCell(numbers.short(row.trained / 1e6)),
         TableCell({True: "yes", False: "no"}.get(row.head_counted, DASH), "text"),
         TableCell(numbers.score(row.measured)), TableCell(numbers.difference(row.difference)),
         TableCell(row.source + (f"; {row.note}" if row.note else ""), "text"), TableCell(row.sure, "text")]
        for row in rows_of(published)
    ]  # fmt: skip
    caption = "Scores of other papers, as printed: under their own budgets, without seeds or spreads."
    return [Table("published", "Published scores", header, rows, caption)] if rows else []


def absent_table(comparison: Comparison, skipped: Iterable[tuple[str, str]]) -> list[Table]:
    """Every run without a score, and every folder that could not be read, with the reason."""
    undone = comparison.runs[comparison.runs["value"].isna()]
    rows = [
        [TableCell(row.setting_name, "text"), TableCell(row.label, "text"), TableCell(str(row.seed)),
         TableCell(_state(row.state), "text"), TableCell(row.reason, "text")]
        for row in rows_of(undone.fillna({"reason": ""}))
    ]  # fmt: skip
    rows += [[TableCell(folder, "text"), TableCell(DASH), TableCell(DASH), TableCell("not read", "text"),
              TableCell(reason, "text")]
             for folder, reason in skipped]  # fmt: skip
    header = ["setting", "method", "seed", "state", "reason"]
    return [Table("absent", "Runs without a score", header, rows)] if rows else []
