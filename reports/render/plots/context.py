"""Shared by all plots: the runs with their styles and titles, matplotlib's settings, panels and legends."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from harness.runs.difference import mean_interval
from harness.runs.result import COSTS
from reports.render.style import GRID, INK, MUTED, PAPER, SeriesStyle

PANELS = 12
"""The largest number of panels in a plot; further settings get further plots."""

DPI = 160
"""Dots per inch of the PNGs."""

LEGEND_COLUMNS = 6
BAR_SEEDS = 3
"""The least seeds for error bars: with two, the interval extends nine standard deviations to either side."""

BARS = "bars: 95 % interval of the mean over seeds (Student's t), none for fewer than three seeds"
PERCENT = PercentFormatter(1, symbol="")
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "svg.hashsalt": "harness",
    "pdf.fonttype": 42,
}
"""matplotlib's settings for every plot."""


@dataclass(frozen=True)
class Plot:
    """A plot before it is saved."""

    name: str
    """Of its files."""
    section: str
    """Of the page."""
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class PlotContext:
    """The finished runs of a report, with each label's style and each setting's title."""

    runs: pd.DataFrame
    styles: Mapping[str, SeriesStyle]
    titles: Mapping[str, str]

    @cached_property
    def averages(self) -> pd.DataFrame:
        """One row per setting and label: the means over seeds of mIoU and `COSTS`, bar (half the 95 % interval of the
        mean mIoU; NaN for fewer than `BAR_SEEDS`), seeds."""
        groups = self.runs.groupby(["setting", "label", "method"], sort=True)
        means = groups[["miou", *COSTS]].mean().astype(float)
        return means.assign(bar=groups.miou.agg(_half_interval), seeds=groups.seed.nunique()).reset_index()

    @property
    def labels(self) -> list[str]:
        return sorted(self.runs.label.unique())

    def seeds(self) -> str:
        """The number of seeds behind the means, for a caption."""
        low, high = self.averages.seeds.min(), self.averages.seeds.max()
        return f"{low} to {high} seeds" if low != high else f"{low} seed" + ("s" if low > 1 else "")


def _half_interval(scores: pd.Series) -> float:
    interval = mean_interval(scores.to_numpy(float))
    return interval.high - interval.estimate if len(scores) >= BAR_SEEDS else math.nan


def setting_titles(runs: pd.DataFrame) -> dict[str, str]:
    """By setting, in the order of the panels: backbone and dataset, and as much of the rest as distinguishes it."""
    firsts = runs.drop_duplicates("setting")
    names = ["backbone", "dataset"]
    for name in ("head", "budget", "weights"):
        if firsts[names].duplicated().any() and firsts[name].nunique() > 1:
            names.append(name)
    short = firsts[names].agg(" · ".join, axis="columns")
    short += (
        (firsts["weights"] == "random").map({True: " · random weights", False: ""}) if "weights" not in names else ""
    )
    texts = short if short.is_unique else firsts["setting_name"]
    titles = dict(zip(firsts["setting"], map(shortened, texts), strict=True))
    return dict(sorted(titles.items(), key=lambda pair: (pair[1], pair[0])))


def shortened(text: str, length: int = 48) -> str:
    """One line without control characters, of at most `length` characters."""
    line = " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def panels(
    titles: Mapping[str, str], height: float, width: float = 3.5, left: float = 0.7, right: float = 0.12, top: float = 0
) -> Iterator[tuple[int, Figure, dict[str, Axes]]]:
    """One panel per setting, at most `PANELS` per figure and three in a row: number, figure, axes by setting.

    All in inches: a panel's size, the width of the labels left and right of it, and the free space above all panels.
    The positions are computed here because matplotlib's own layout draws every label several times to find them.
    """
    above, below, foot = 0.26, 0.3, 0.3
    every = list(titles.items())
    for number, first in enumerate(range(0, len(every), PANELS), 1):
        group = every[first : first + PANELS]
        columns = min(3, len(group))
        rows = math.ceil(len(group) / columns)
        each = max(width, 6.2 / columns)
        size = each * columns, height * rows + foot + top
        figure = Figure(figsize=size, dpi=DPI)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(
            left=left / size[0], right=1 - right / size[0], wspace=(left + right) / (each - left - right),
            bottom=(foot + below) / size[1], top=1 - (top + above) / size[1],
            hspace=(above + below) / (height - above - below),
        )  # fmt: skip
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for spare in grid[len(group) :]:
            spare.remove()
        for axes, (_, title) in zip(grid, group, strict=False):
            axes.set_title(title)
        yield number, figure, dict(zip((setting for setting, _ in group), grid, strict=False))


def label_width(names: Iterable[str]) -> float:
    """The width of the longest tick label, in inches."""
    return 0.25 + 0.065 * max(map(len, names), default=0)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def numbered(name: str, number: int, titles: Mapping[str, str]) -> str:
    return name if len(titles) <= PANELS else f"{name}-{number}"


def add_legend(figure: Figure, context: PlotContext) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
            markersize=5 * style.size,
            linewidth=1.1,
        )
        for style in (context.styles[label] for label in context.labels)
    ]
    names = [shortened(label, 28) for label in context.labels]
    figure.legend(handles, names, loc="upper left", ncols=LEGEND_COLUMNS, borderaxespad=0.2)


def legend_height(context: PlotContext) -> float:
    """The height of the legend, in inches."""
    return 0.1 + 0.17 * math.ceil(len(context.labels) / LEGEND_COLUMNS)


def slug(text: str) -> str:
    """A file name that is safe everywhere."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:120] or "x"
