"""The tables of a report, of frames: results as papers print them, verdicts, averages, what is cited, what is absent.

Nothing is computed here but means over datasets; how a table becomes a file is `formats.py`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import pandas as pd

from harness.errors import UserError, did_you_mean
from reports.analysis.comparison import Comparison
from reports.render.formats import Mark, Table, TableCell

DASH = "–"
TIED = "≈"


@dataclass(frozen=True)
class NumberFormat:
    """How numbers are written; the same in every table."""

    unit: Literal["percent", "share"] = "percent"
    decimals: int | None = None
    """Of figures; None: 2 in percent, 4 as a share."""
    sign: Literal[".", ","] = "."

    @property
    def of_figures(self) -> str:
        """What a heading of figures ends in."""
        return " (%)" if self.unit == "percent" else ""

    @property
    def of_differences(self) -> str:
        return " (points)" if self.unit == "percent" else ""

    def figure(self, value: float) -> str:
        """An mIoU, given as a share."""
        return self._share(value, "")

    def difference(self, value: float) -> str:
        """Of two figures, with its sign."""
        return self._share(value, "+")

    def plain(self, value: float) -> str:
        return DASH if math.isnan(value) else self._localised(f"{value:.2f}")

    def short(self, value: float) -> str:
        """Three digits that matter; all digits before the decimal sign. A dash for what is not known."""
        if not math.isfinite(value):
            return DASH
        if value == 0:
            return "0"
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return self._localised(f"{value:.{digits}f}")

    def p(self, value: float) -> str:
        return DASH if math.isnan(value) else self._localised("< 0.001" if value < 0.001 else f"{value:.3f}")

    def _share(self, value: float, sign: str) -> str:
        percent = self.unit == "percent"
        decimals = (2 if percent else 4) if self.decimals is None else self.decimals
        return DASH if math.isnan(value) else self._localised(f"{value * (100 if percent else 1):{sign}.{decimals}f}")

    def _localised(self, text: str) -> str:
        return text.replace("-", "−").replace(".", self.sign)


@dataclass(frozen=True)
class CostColumn:
    """A column of what a method costs: its heading, and its numbers' unit."""

    header: str
    column: str
    unit: float | None = 1
    """None: of `TIMES`, named in the heading."""


TIMES = (("h", 3600), ("min", 60), ("s", 1))
COLUMNS = {
    "trained": CostColumn("trained, M", "trained_method", 1e6),
    "head": CostColumn("head, M", "trained_head", 1e6),
    "share": CostColumn("of backbone, %", "share", 0.01),
    "delta": CostColumn("delta, MiB", "delta_bytes", 2**20),
    "memory": CostColumn("memory, GiB", "peak_memory_bytes", 2**30),
    "time": CostColumn("training, {}", "train_seconds", None),
    "inference": CostColumn("inference, ×", "inference_ratio"),
}
"""What `--columns` and `--sort` name, beside `figure`, `published` and `label`."""
CHOICES = ["figure", *COLUMNS, "published"]
SORTS = ["figure", "label", *COLUMNS]


@dataclass(frozen=True)
class TableLayout:
    """Which columns, in which order of rows."""

    columns: tuple[str, ...] = tuple(CHOICES)
    sort: str = "figure"
    """One of `SORTS`; a minus before it turns it round. Figures come with the best first, costs with the lowest."""

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
    """Reasons by letter; one reason has one letter however often it is pointed to."""

    texts: list[str] = field(default_factory=list)

    def letter(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        index, letters = self.texts.index(text), ""
        while index >= 0:
            index, letter = divmod(index, 26)
            letters, index = string.ascii_lowercase[letter] + letters, index - 1
        return letters

    def told(self) -> list[str]:
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
            block.footnotes.told(),
        )
        for number, block in enumerate(blocks, 1)
    ]


class _Block:
    """One backbone with its weights, head and budget: what is known of it, and the footnotes that its cells need."""

    def __init__(self, rows: pd.DataFrame, comparison: Comparison, published: pd.DataFrame, numbers: NumberFormat):
        settings = rows.drop_duplicates("setting").sort_values(["dataset", "setting"])
        self.numbers, self.metric, self.footnotes = numbers, comparison.metric, Footnotes()
        self.datasets = dict(zip(settings["setting"], settings["dataset"], strict=True))
        if len(set(self.datasets.values())) < len(self.datasets):  # versions of one dataset's files
            self.datasets = {row.setting: f"{row.dataset} ({row.data_digest[:8]})" for row in settings.itertuples()}
        self.rows = {(row.setting, row.label): row for row in rows.itertuples()}
        self.runs = dict(list(comparison.runs.groupby(["setting", "label"])))
        measured = published[published["setting"].isin(set(self.datasets))].dropna(subset="measured_label")
        self.published = dict(list(measured.groupby(["setting", "measured_label"])))
        self.means = rows.groupby("label")[["mean", *(column.column for column in COLUMNS.values())]].mean()
        self.seeds = sorted(rows.loc[rows["seeds"] > 0, "seeds"].unique())
        first = rows.iloc[0]
        random = ", random weights" if first["weights"] == "random" else ""
        self.name = f"{first['backbone']}, {first['head']}, {first['budget']}{random}"
        self.full_name = f"{self.name}, weights {first['weights']}, budget {first['budget_digest'][:8]}"

    def labels(self, sort: str) -> list[str]:
        """Labels without a value come last, whichever way round."""
        name = sort.removeprefix("-")
        ranks = pd.Series(range(len(self.means)), self.means.index, dtype=float)  # in the order of their labels
        if name != "label":
            ranks = -self.means["mean"] if name == "figure" else self.means[COLUMNS[name].column]
        ranks = -ranks if sort.startswith("-") else ranks
        return sorted(ranks.index, key=lambda label: (math.isnan(ranks[label]), ranks[label], label))

    def columns(self, choices: Iterable[str]) -> Iterator[tuple[str, Callable[[str], TableCell]]]:
        """Heading, and the cell of a label."""
        for choice in choices:
            if choice == "figure":
                for setting, dataset in self.datasets.items():
                    yield f"{dataset}, {self.metric}{self.numbers.of_figures}", partial(self._figure, setting)
            elif choice == "published":
                for setting, dataset in self.datasets.items() if self.published else ():
                    yield f"{dataset}, published (difference)", partial(self._published, setting)
            else:
                yield self._cost_column(COLUMNS[choice])

    @property
    def caption(self) -> str:
        spread = {0: "No run is done", 1: "One seed"}.get(
            max(self.seeds, default=0),
            f"Mean ± standard deviation over {self.seeds[0] if len(self.seeds) == 1 else 'n'} seeds",
        )
        told = [
            spread,
            f"best bold, second underlined, {TIED}: the paired 95 % interval of the difference to the best contains 0",
            *(["costs are means over the datasets"] if len(self.datasets) > 1 else []),
        ]
        return "; ".join(told) + "."

    def _figure(self, setting: str, label: str) -> TableCell:
        if (setting, label) not in self.rows:
            return TableCell(DASH)
        row, runs = self.rows[setting, label], self.runs[setting, label]
        undone = runs[runs["value"].isna()].fillna({"reason": ""})
        notes = sorted(
            self.footnotes.letter(_why(state, reason, group["seed"], of=len(runs)))
            for (state, reason), group in undone.groupby(["state", "reason"])
        )
        if not row.seeds:
            states = [_told(state) for state in dict.fromkeys(undone["state"])]
            text = DASH if states == ["unsupported"] else ", ".join(states)
            return TableCell(text, notes=",".join(notes))
        text = self.numbers.figure(row.mean)
        text += f" ± {self.numbers.figure(row.std)}" if row.seeds > 1 else ""
        text += f" (n = {row.seeds})" if len(self.seeds) > 1 else ""
        text += f" {TIED}" if row.tied else ""
        return TableCell(text, mark="best" if row.best else "second" if row.second else None, notes=",".join(notes))

    def _published(self, setting: str, label: str) -> TableCell:
        """All published figures of a method, each with its difference and its source as a footnote."""
        if (setting, label) not in self.published:
            return TableCell("")
        told, notes = [], []
        for row in self.published[setting, label].itertuples():
            known = not math.isnan(row.difference)
            told.append(self.numbers.figure(row.value)
                        + (f" ({self.numbers.difference(row.difference)})" if known else ""))  # fmt: skip
            source = f"published by {row.source} ({row.sure})" + (f"; {row.note}" if row.note else "")
            notes.append(self.footnotes.letter(source))
        return TableCell("; ".join(told), notes=",".join(notes))

    def _cost_column(self, column: CostColumn) -> tuple[str, Callable[[str], TableCell]]:
        values, (header, unit) = self.means[column.column], (column.header, column.unit)
        if column.unit is None:  # of time: that in which the longest is easily read
            word, unit = next(one for one in TIMES if values.max() >= 10 * one[1] or one == TIMES[-1])
            header = header.format(word)
        written = (values / unit).map(self.numbers.short)
        return header, lambda label: TableCell(written[label])


def _told(state: str) -> str:
    """In a table; a run that is done and has no figure is one whose classes are all absent."""
    return "undefined" if state == "done" else state.replace("_", " ")


def _why(state: str, reason: str, seeds: Iterable[int], of: int) -> str:
    told = _told(state) + (f": {reason}" if reason else "")
    return f"seed {', '.join(map(str, sorted(seeds)))} {told}" if of > 1 and state != "unsupported" else told


def significance_tables(comparison: Comparison, numbers: NumberFormat) -> list[Table]:
    """One table a setting and reference: every method's difference to it, and the verdict in words."""
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
            for row in rows.itertuples()
        ]
        difference = f"difference, {comparison.metric}{numbers.of_differences}"
        header = ["method", difference, "95 % interval", "p", "p (Holm)", "seeds", "verdict"]
        caption = (
            "Paired bootstrap over images and seeds; p of the paired permutation test over images, Holm's correction "
            f"over the {len(rows)} methods of this table. A verdict takes both: an interval without 0, p (Holm) < 0.05."
        )
        if (rows["seeds"] == 1).any():
            caption += " With one seed it is of these trained networks, not of the methods."
        tables.append(
            Table(f"against-{number}", f"{setting}: against {reference}", header, cells, caption, footnotes.told())
        )
    return tables


_MARKS: dict[str, Mark] = {"better": "better", "worse": "worse", "no significant difference": "same"}


def overall_tables(comparison: Comparison, numbers: NumberFormat) -> list[Table]:
    """Over all settings: ranks and IQM, probability of improvement, and how stable the order is between backbones."""
    averages = [
        [TableCell(row.label, "text"), TableCell(numbers.plain(row.mean_rank)), TableCell(numbers.figure(row.iqm)),
         TableCell(_between(row.iqm_low, row.iqm_high, numbers.figure))]
        for row in comparison.averages.itertuples()
    ]  # fmt: skip
    improvement = [
        [TableCell(row.label, "text"), TableCell(row.reference, "text"), TableCell(str(row.settings)),
         TableCell(str(row.runs)),
         TableCell(numbers.plain(row.probability)),
         TableCell(_between(row.probability_low, row.probability_high, numbers.plain)),
         TableCell(numbers.difference(row.iqm)), TableCell(_between(row.iqm_low, row.iqm_high, numbers.difference))]
        for row in comparison.improvement.itertuples()
    ]  # fmt: skip
    stability = [
        [TableCell(row.one, "text"), TableCell(row.other, "text"), TableCell(str(row.methods)),
         TableCell(numbers.plain(row.tau))]
        for row in comparison.stability.itertuples()
    ]  # fmt: skip
    settings = comparison.averages["settings"].max()
    tables = [
        Table(
            "overall", "Mean rank and IQM", ["method", "mean rank", f"IQM, {comparison.metric}{numbers.of_figures}",
                                             "95 % interval"], averages,
            f"Methods that are done in every setting with a result, of which there are {settings}; rank 1 is best. "
            "IQM: the mean of the middle half of all runs; intervals "
            "resample settings and seeds, and are too narrow where there are few of them.",
        ),
        Table(
            "improvement", "Probability of improvement",
            ["method", "over", "settings", "runs", "probability", "95 % interval",
             f"IQM of the difference, {comparison.metric}{numbers.of_differences}", "95 % interval"], improvement,
            "How probable it is that a run of the method beats one of the reference in a random setting; 0.5 is even. "
            "Intervals resample settings and seeds, and are too narrow where there are few of them.",
        ),
        Table(
            "stability", "Kendall's τ between backbones", ["setting", "and", "methods", "τ"], stability,
            "1: both order the methods alike; −1: one order is the other's reverse.",
        ),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _between(low: float, high: float, write: Callable[[float], str]) -> str:
    return DASH if math.isnan(low) else f"{write(low)} to {write(high)}"


def published_table(published: pd.DataFrame, metric: str, numbers: NumberFormat) -> list[Table]:
    """Every published figure that belongs to a setting of the report, with what was measured there."""
    header = ["setting", "method", f"published, {metric}{numbers.of_figures}", "trained, M", "head counted", "measured",
              "difference", "source", "how sure"]  # fmt: skip
    rows = [
        [TableCell(row.setting_name, "text"), TableCell(row.label, "text"), TableCell(numbers.figure(row.value)),
         TableCell(numbers.short(row.trained / 1e6)),
         TableCell({True: "yes", False: "no"}.get(row.head_counted, DASH), "text"),
         TableCell(numbers.figure(row.measured)), TableCell(numbers.difference(row.difference)),
         TableCell(row.source + (f"; {row.note}" if row.note else ""), "text"), TableCell(row.sure, "text")]
        for row in published.itertuples()
    ]  # fmt: skip
    caption = "Others' figures as they are printed: under their own budgets, without seeds and spreads."
    return [Table("published", "Published figures", header, rows, caption)] if rows else []


def absent_table(comparison: Comparison, skipped: Iterable[tuple[str, str]]) -> list[Table]:
    """Every cell without a figure, and every folder that could not be read, with the reason."""
    undone = comparison.runs[comparison.runs["value"].isna()]
    rows = [
        [TableCell(row.setting_name, "text"), TableCell(row.label, "text"), TableCell(str(row.seed)),
         TableCell(_told(row.state), "text"), TableCell(row.reason, "text")]
        for row in undone.fillna({"reason": ""}).itertuples()
    ]  # fmt: skip
    rows += [[TableCell(folder, "text"), TableCell(DASH), TableCell(DASH), TableCell("not read", "text"),
              TableCell(reason, "text")]
             for folder, reason in skipped]  # fmt: skip
    return [Table("absent", "Without a figure", ["setting", "method", "seed", "state", "reason"], rows)] if rows else []
