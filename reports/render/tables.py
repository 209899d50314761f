"""The tables of a report: results as papers print them, published scores, runs without a score.

Nothing is computed here but means over datasets; `formats.py` writes the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd

from harness.errors import UserError, did_you_mean
from harness.runs.result import COSTS, ONLY_FOUND
from harness.runs.state import RunState
from reports.analysis.comparison import Comparison, about_unlabelled
from reports.analysis.paired import NO_VERDICT, NOT_COMPARABLE, TIED, WORSE
from reports.read.frames import rows_of
from reports.read.rows import split_warnings, state_label
from reports.render.formats import Footnotes, Table, TableCell
from reports.render.numbers import DASH, SIZES, UNITS, NumberFormat

MARKS = {TIED: "≈", NO_VERDICT: "?", NOT_COMPARABLE: "?"}
"""After a score, by `to_best`."""


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


def result_tables(
    comparison: Comparison, published: pd.DataFrame, layout: TableLayout, numbers: NumberFormat
) -> list[Table]:
    """One table per backbone with its weights, head and budget: methods are rows, datasets columns."""
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
            block.caption(layout.columns),
            [*block.footnotes.lines(), *(f"Warning: {text}" for text in block.warnings)],
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
        runs = comparison.runs[comparison.runs["setting"].isin(set(self.datasets))].fillna({"reason": ""})
        self.runs = dict(list(runs.groupby(["setting", "label"])))
        measured = published[published["setting"].isin(set(self.datasets))].dropna(subset="measured_label")
        self.published = dict(list(measured.groupby(["setting", "measured_label"])))
        self.to_best = list(rows["to_best"])
        self.means = rows.groupby("label")[["mean", *(column.key for column in COLUMNS.values())]].mean()
        self.seeds = sorted(rows.loc[rows["seeds"] > 0, "seeds"].unique())
        self.warnings = split_warnings(rows["warnings"])
        first = rows.iloc[0]
        random = ", random weights" if first["weights"] == "random" else ""
        self.name = f"{first['backbone']}, {first['head']}, {first['budget']}{random}"
        self.full_name = f"{self.name}, weights {first['weights']}, budget {first['budget_digest'][:8]}"

    def labels(self, sort: str) -> list[str]:
        """The labels in the order of the rows; those without a value come last in either direction."""
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

    def caption(self, choices: Collection[str]) -> str:
        spread = {0: "No finished run", 1: "One seed"}.get(
            max(self.seeds, default=0),
            f"Mean ± standard deviation over {self.seeds[0] if len(self.seeds) == 1 else 'n'} seeds",
        )
        sentences = [
            spread,
            "best in bold, second underlined",
            *self._about_ties(),
            *(["costs are means over the datasets"] if len(self.datasets) > 1 else []),
            *(["time counts what was read from a cache as when it was computed"] if "time" in choices else []),
        ]
        return "; ".join(sentences) + "."

    def _about_ties(self) -> Iterator[str]:
        found = set(self.to_best)
        if found & {TIED, WORSE}:
            yield f"{MARKS[TIED]}: not significantly worse than the best (5 %, Tukey)"
        if found & {NO_VERDICT, NOT_COMPARABLE}:
            yield f"{MARKS[NO_VERDICT]}: no verdict on its difference to the best; results.csv says why"

    def _score(self, setting: str, label: str) -> TableCell:
        if (setting, label) not in self.rows:
            return TableCell(DASH)
        row, runs = self.rows[setting, label], self.runs[setting, label]
        undone = [run for run in rows_of(runs) if math.isnan(run.value)]
        reasons: dict[tuple[str, str], list[int]] = {}
        for run in undone:
            reasons.setdefault((run.state, run.reason), []).append(run.seed)
        notes = sorted(
            self.footnotes.letter(_why(state, reason, seeds, of=len(runs)))
            for (state, reason), seeds in sorted(reasons.items())
        )
        doubts = sorted({text for text in runs["doubts"] if text})
        notes += [self.footnotes.letter(f"about its search: {text}") for text in doubts]
        notes += [self.footnotes.letter(about_unlabelled(row.unlabelled))] if row.unlabelled else []
        notes += [self.footnotes.letter(f"{row.only_found}: {ONLY_FOUND}")] if row.only_found else []
        if not row.seeds:
            states = [_state(state) for state in dict.fromkeys(run.state for run in undone)]
            text = DASH if states == [RunState.UNSUPPORTED.label] else ", ".join(states)
            return TableCell(text, notes=",".join(notes))
        text = self.numbers.score(row.mean)
        text += f" ± {self.numbers.score(row.std)}" if row.seeds > 1 else ""
        text += f" (n = {row.seeds})" if len(self.seeds) > 1 else ""
        text += f" {MARKS[row.to_best]}" if row.to_best in MARKS else ""
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
    """The state of a run without a score; one that is done has none where every class is absent."""
    return "undefined" if name == RunState.DONE else state_label(name)


def _why(state: str, reason: str, seeds: Iterable[int], of: int) -> str:
    text = _state(state) + (f": {reason}" if reason else "")
    return f"seed {', '.join(map(str, sorted(seeds)))} {text}" if of > 1 and state != RunState.UNSUPPORTED else text


def published_table(published: pd.DataFrame, comparison: Comparison, numbers: NumberFormat) -> list[Table]:
    """Every published score that belongs to a setting of the report, with the score measured there."""
    metric, footnotes = comparison.metric, Footnotes()
    header = ["setting", "method", f"published, {metric}{numbers.score_unit}", "trained, M", "head counted", "measured",
              "difference", "source", "certainty"]  # fmt: skip
    rows = [
        [TableCell(row.setting_name, "text"), TableCell(row.label, "text"), TableCell(numbers.score(row.value)),
         TableCell(numbers.short(row.trained / 1e6)),
         TableCell({True: "yes", False: "no"}.get(row.head_counted, DASH), "text"),
         TableCell(numbers.score(row.measured),
                   notes=",".join(map(footnotes.letter, comparison.about_labels(row.setting)))),
         TableCell(numbers.difference(row.difference)),
         TableCell(row.source + (f"; {row.note}" if row.note else ""), "text"), TableCell(row.sure, "text")]
        for row in rows_of(published)
    ]  # fmt: skip
    caption = "Scores of other papers, as printed: under their own budgets, without seeds or spreads."
    return [Table("published", "Published scores", header, rows, caption, footnotes.lines())] if rows else []


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
