"""Drawings of a report, each as PNG, SVG and PDF: what a method costs against what it reaches, and how sure that is.

Every drawing says in its caption what a point and a bar are. The same runs give the same bytes: nothing here depends on
the clock, on the machine's speed or on chance.
"""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import os
import re
import sys
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import scikit_posthocs
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from scipy import stats

from harness.util.files import atomically
from reports.analysis.statistics import kendall_tau, pareto_front
from reports.read.collect import Collected, SearchRecord
from reports.render.style import GRID, HUES, INK, MUTED, PAPER, SeriesStyle, looks
from studies.search.spec import OBJECTIVES

PANELS = 12
"""How many panels one drawing holds; more settings go on further sheets."""

DPI = 160
"""Of the PNGs."""

CLASSES = 30
"""How many classes one panel holds."""

FORMATS: dict[str, Callable[[Figure, Path], None]] = {
    "png": lambda figure, path: FigureCanvasAgg(figure).print_png(path, metadata={"Software": None}),
    "svg": lambda figure, path: FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None, "Creator": None}),
    "pdf": lambda figure, path: FigureCanvasPdf(figure).print_pdf(
        path, metadata={"CreationDate": None, "Creator": None, "Producer": None}
    ),
}
"""Straight to the canvases: `savefig` draws everything once more, to find a layout that is fixed by then."""

LEGEND_COLUMNS = 6
PERCENT = PercentFormatter(1, symbol="")
STYLE = {
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


@dataclass(frozen=True)
class Drawing:
    """One drawing: what it shows in words, and its files."""

    name: str
    section: str
    title: str
    caption: str
    files: tuple[Path, ...]

    @property
    def svg(self) -> str:
        return next(path for path in self.files if path.suffix == ".svg").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Cost:
    """What a method costs, as one axis: a column of the runs and how its numbers are written."""

    column: str
    title: str
    axis: str
    kind: str
    unit: float = 1
    head_counted: bool | None = None
    """Which published parameter counts belong on this axis; None: it is not of parameters."""


COSTS = (
    Cost(
        "trained_method",
        "trained parameters",
        "parameters that the method trains, the head apart",
        "count",
        head_counted=False,
    ),
    Cost(
        "trained", "trained parameters with the head", "trained parameters, method and head", "count", head_counted=True
    ),
    Cost("peak_memory_bytes", "peak memory", "peak memory while training, MiB", "bytes", 2**20),
    Cost("train_seconds", "training time", "training time without evaluation, s", "seconds"),
    Cost("delta_bytes", "delta", "size of the delta, MiB", "bytes", 2**20),
)


def draw_all(collected: Collected, published: pd.DataFrame, significance: pd.DataFrame, folder: Path) -> list[Drawing]:
    """Draw everything that the runs hold something for into `folder`; what they hold nothing for is left out.

    `published` has a row a published figure that belongs to one of the settings, `significance` a row a setting,
    reference and label.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with mpl.rc_context({**mpl.rcParamsDefault, **STYLE}):
        return _save(sheets(collected, published, significance), folder)


def sheets(collected: Collected, published: pd.DataFrame, significance: pd.DataFrame) -> Iterator[Sheet]:
    """The drawings of `draw_all`, not yet saved; in matplotlib's style of the moment."""
    runs = finished(collected.runs)
    if not runs.empty:
        scene = PlotContext(runs, looks_of(collected.reported, published), _titles(runs))
        for cost in COSTS:
            yield from _tradeoff(scene, cost, published)
        yield from _differences(scene, significance)
        yield from _ranks(scene)
        yield from _critical_differences(scene)
        yield from _curves(scene, collected.curves)
        yield from _classes(scene, collected.per_class)
    yield from _searches(collected.searches)


def looks_of(runs: pd.DataFrame, published: pd.DataFrame) -> dict[str, SeriesStyle]:
    """The looks of all labels of a report, and of the methods of its published figures by their names."""
    cited = [str(method) for method in published.method]
    return looks({**dict(zip(cited, cited, strict=True)), **dict(zip(runs.label, runs.method, strict=True))})


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that have a figure to report: done, and evaluated on the reported part."""
    return runs[(runs.state == "done") & (runs.part == "report") & runs.miou.notna()]


def _titles(runs: pd.DataFrame) -> dict[str, str]:
    """Each setting's backbone and dataset, and as much of the rest as tells it from the others."""
    firsts = runs.drop_duplicates("setting")
    told = ["backbone", "dataset"]
    for name in ("head", "budget", "weights"):
        if firsts[told].duplicated().any() and firsts[name].nunique() > 1:
            told.append(name)
    short = firsts[told].agg(" · ".join, axis="columns")
    short += (
        (firsts["weights"] == "random").map({True: " · random weights", False: ""}) if "weights" not in told else ""
    )
    names = short if short.is_unique else firsts["setting_name"]
    titles = dict(zip(firsts["setting"], map(shortened, names), strict=True))
    return dict(sorted(titles.items(), key=lambda pair: (pair[1], pair[0])))


def averages(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a setting and label: the mean over seeds of figure and costs, the figure's spread, the seeds' count.

    The spread is the sample standard deviation; NaN for one seed.
    """
    groups = runs.groupby(["setting", "label", "method"], sort=True)
    means = groups[["miou", *(cost.column for cost in COSTS)]].mean().astype(float)
    return means.assign(spread=groups.miou.std(ddof=1), seeds=groups.seed.nunique()).reset_index()


def shortened(text: str, length: int = 48) -> str:
    """One printable line: what a font has no shape for and what would break a line goes."""
    line = " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


@dataclass(frozen=True)
class PlotContext:
    """What all drawings share."""

    runs: pd.DataFrame
    looks: Mapping[str, SeriesStyle]
    titles: Mapping[str, str]

    @cached_property
    def averages(self) -> pd.DataFrame:
        return averages(self.runs)

    @property
    def labels(self) -> list[str]:
        return sorted(self.runs.label.unique())

    def seeds(self) -> str:
        """For a caption: over how many seeds a mean goes."""
        low, high = self.averages.seeds.min(), self.averages.seeds.max()
        return f"{low} to {high} seeds" if low != high else f"{low} seed" + ("s" if low > 1 else "")


@dataclass(frozen=True)
class Sheet:
    """A drawing before it is saved."""

    name: str
    section: str
    title: str
    caption: str
    figure: Figure

    def in_folder(self, folder: Path) -> Drawing:
        files = tuple(folder / f"{self.name}.{suffix}" for suffix in FORMATS)
        return Drawing(self.name, self.section, self.title, self.caption, files)

    def save(self, folder: Path) -> Drawing:
        _freeze(self.figure)
        drawing = self.in_folder(folder)
        for path, write in zip(drawing.files, FORMATS.values(), strict=True):
            with atomically(path) as temporary:
                write(self.figure, temporary)
        return drawing


def _attempt(sheet: Sheet, folder: Path) -> None:
    try:
        sheet.save(folder)
    except Exception:
        sys.exit(1)  # the parent tries again, and says why


def _save(drawn: Iterable[Sheet], folder: Path) -> list[Drawing]:
    """Save each sheet in a process of its own, as many at once as there are cores, while the next one is drawn."""
    forked = multiprocessing.get_context("fork")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    saving: deque[tuple[Sheet, BaseProcess]] = deque()
    drawings = []

    def finish() -> None:
        sheet, process = saving.popleft()
        process.join()
        if process.exitcode:
            sheet.save(folder)
        drawings.append(sheet.in_folder(folder))

    for sheet in drawn:
        process = forked.Process(target=_attempt, args=(sheet, folder))
        process.start()
        saving.append((sheet, process))
        if len(saving) == cores:
            finish()
    while saving:
        finish()
    return drawings


def _panels(
    titles: Mapping[str, str], height: float, width: float = 3.5, left: float = 0.7, right: float = 0.12, top: float = 0
) -> Iterator[tuple[int, Figure, dict[str, Axes]]]:
    """One panel a setting, at most `PANELS` a figure and three beside each other: number, figure, axes by setting.

    All in inches: a panel's size, what its labels take left and right of it, and what is kept free above all panels.
    The places are computed here because matplotlib's own layout draws every label several times to find them.
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


def _room_for(names: Iterable[str]) -> float:
    """Inches that the longest of some tick labels takes."""
    return 0.25 + 0.065 * max(map(len, names), default=0)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _freeze(figure: Figure) -> None:
    """Lay the figure out now, and not once more for each file."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def _numbered(name: str, number: int, titles: Mapping[str, str]) -> str:
    return name if len(titles) <= PANELS else f"{name}-{number}"


def _tradeoff(scene: PlotContext, cost: Cost, published: pd.DataFrame) -> Iterator[Sheet]:
    rows = scene.averages.dropna(subset=[cost.column])
    cited = published[published.head_counted == cost.head_counted] if cost.head_counted is not None else published[:0]
    cited = cited.dropna(subset=["trained", "value"])
    if rows.empty or (cost.head_counted and cited.empty):
        return  # the head is the same for all: counting it says something only beside figures that count it too
    logarithmic = cost.head_counted is not None or rows[cost.column].max() > 10 * rows[cost.column].min() > 0
    scale = (
        f" (log{', 0 left of the break' if logarithmic and (rows[cost.column] == 0).any() else ''})"
        if logarithmic
        else ""
    )
    for number, figure, panels in _panels(scene.titles, 3.1):
        texts = {
            setting: _tradeoff_panel(
                axes, rows[rows.setting == setting], cited[cited.setting == setting], cost, logarithmic, scene.looks
            )
            for setting, axes in panels.items()
        }
        figure.supxlabel(cost.axis + scale, fontsize=8, color=MUTED)
        figure.supylabel("mIoU, %", fontsize=8, color=MUTED)
        _spread_labels(figure, {axes: texts[setting] for setting, axes in panels.items()})
        has_cited = cited.setting.isin(list(panels)).any()
        yield Sheet(
            _numbered(f"tradeoff-{cost.column.replace('_', '-')}", number, scene.titles),
            "tradeoff",
            f"mIoU against {cost.title}",
            f"Mean over {scene.seeds()}; bars are ± one standard deviation over seeds (none for one seed). The line is "
            "the Pareto front: nothing measured reaches more at no more cost. Dashed: full fine-tuning; dotted: linear "
            "probe." + (" Hollow: published figures." if has_cited else ""),
            figure,
        )


def _tradeoff_panel(
    axes: Axes, rows: pd.DataFrame, cited: pd.DataFrame, cost: Cost, logarithmic: bool, looks: Mapping[str, SeriesStyle]
) -> list[Text]:
    """The points of one setting; returns the texts that are to be moved apart."""
    x = rows[cost.column] / cost.unit
    _set_scale(axes, x if cited.empty else pd.concat([x, cited.trained]), logarithmic, cost.kind)
    for name, dashes in (("full", (5, 3)), ("linear", (1, 2))):
        for value in rows.miou[rows.label == name]:
            axes.axhline(value, color=MUTED, linewidth=0.8, linestyle=(0, dashes), zorder=1)
    front = rows.assign(x=x)[pareto_front(rows[cost.column].to_numpy(), rows.miou.to_numpy())].sort_values("x")
    axes.plot(front.x, front.miou, color=MUTED, linewidth=1.0, alpha=0.7, drawstyle="steps-post", zorder=1.5)
    colours = [looks[label].colour for label in rows.label]
    axes.vlines(x, rows.miou - rows.spread, rows.miou + rows.spread, colors=colours, linewidth=1.1, zorder=2)
    texts = []
    for row, at in zip(rows.itertuples(), x, strict=True):
        look = looks[row.label]
        axes.plot(
            at, row.miou, look.marker, color=look.colour, markersize=5.5 * look.size, mec=PAPER, mew=0.5, zorder=3
        )
        texts.append(axes.text(at, row.miou, shortened(row.label, 24), fontsize=7, color=look.colour, zorder=4))
    for row in cited.itertuples():
        look, at = looks[row.method], (row.trained, row.value)
        axes.plot(*at, look.marker, mfc="none", mec=look.colour, markersize=6 * look.size, mew=1.0, zorder=2)
        texts.append(axes.text(*at, shortened(row.label, 24), fontsize=6.5, color=MUTED))
    axes.margins(x=0.08, y=0.12)
    axes.yaxis.set_major_formatter(PERCENT)
    return texts


def _set_scale(axes: Axes, values: pd.Series, logarithmic: bool, kind: str) -> None:
    """Linear or logarithmic; on a logarithmic axis a method that trains nothing stands at 0, left of a break."""
    written = EngFormatter(sep="") if kind == "count" else FuncFormatter(lambda value, _: f"{value:g}")
    positive = values[values > 0]
    if not logarithmic or positive.empty:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(written)
        return
    low, high = positive.min() / 1.7, positive.max() * 1.7
    parts = (1,) if high > 100 * low else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [part * 10**power for power in powers for part in parts if low <= part * 10**power <= high]
    if (values > 0).all():
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    else:
        axes.set_xscale("symlog", linthresh=low, linscale=0.35)
        axes.set_xlim(-0.4 * low, high)
        ticks = [0, *ticks]
        axes.plot(
            [0.75 * low, 0.95 * low], [0, 0], linestyle="none", marker=[(-1, -2), (1, 2)], markersize=7, color=MUTED,
            markeredgewidth=0.8, transform=axes.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(written)


def _spread_labels(figure: Figure, texts: Mapping[Axes, list[Text]]) -> None:
    """Move labels off the points and off each other, by a fixed number of rounds so that no clock decides.

    A line joins a label that went far to its point.
    """
    hidden = [
        artist
        for axes, own in texts.items()
        for artist in (axes, *axes.get_children())
        if artist not in own and artist.get_visible()
    ]
    for artist in hidden:
        artist.set_visible(False)  # adjustText draws the figure to measure the labels of one panel
    lines = []
    for axes, own in texts.items():
        axes.set_visible(True)
        lines += _spread(axes, own)
        axes.set_visible(False)
    for artist in hidden:
        artist.set_visible(True)
    for axes, start, end in lines:
        axes.plot(*zip(start, end, strict=True), color=MUTED, linewidth=0.4, zorder=1.2, scalex=False, scaley=False)


def _spread(axes: Axes, texts: list[Text]) -> Iterator[tuple[Axes, np.ndarray, np.ndarray]]:
    if not texts:
        return
    points = np.array([text.get_position() for text in texts])
    adjust_text(
        texts, ax=axes, x=points[:, 0], y=points[:, 1], iter_lim=100, expand=(1.2, 1.5), force_text=(0.2, 0.35),
        max_move=(12, 12), prevent_crossings=False,
    )  # fmt: skip
    for text, point in zip(texts, points, strict=True):
        box, end = text.get_window_extent(), axes.transData.transform(point)
        start = np.clip(end, box.min, box.max)
        if np.linalg.norm(start - end) > 0.2 * DPI:
            yield axes, axes.transData.inverted().transform(start), point


def _differences(scene: PlotContext, significance: pd.DataFrame) -> Iterator[Sheet]:
    """A forest of each method's difference to a reference, its verdict beside it in words."""
    for reference, rows in significance[significance.setting.isin(list(scene.titles))].groupby("reference"):
        titles = {setting: title for setting, title in scene.titles.items() if setting in set(rows.setting)}
        height = 0.8 + 0.2 * rows.groupby("setting").size().max()
        left = _room_for(shortened(label, 24) for label in rows.label)
        for number, figure, panels in _panels(titles, height, 2.3 + left + 1.3, left, right=1.3):
            for setting, axes in panels.items():
                _differences_panel(axes, rows[rows.setting == setting].sort_values("difference"), scene.looks)
            figure.supxlabel(f"difference in mIoU to {shortened(reference)}, points", fontsize=8, color=MUTED)
            yield Sheet(
                _numbered(f"difference-to-{_slug(reference)}", number, titles),
                "statistics",
                f"Difference to {shortened(reference)}",
                "Mean difference with its paired 95 % interval over images and seeds. Filled: better or worse after "
                "Holm's correction. Hollow: no significant difference.",
                figure,
            )


def _differences_panel(axes: Axes, rows: pd.DataFrame, looks: Mapping[str, SeriesStyle]) -> None:
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for height, row in enumerate(rows.itertuples()):
        look = looks[row.label]
        sure = row.verdict in ("better", "worse")
        axes.plot([row.low, row.high], [height, height], color=look.colour, linewidth=1.1, solid_capstyle="butt")
        face = look.colour if sure else PAPER
        axes.plot(row.difference, height, look.marker, markersize=5 * look.size, color=look.colour, mfc=face)
        axes.annotate(
            row.verdict, (1, height), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=6.5,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [shortened(label, 24) for label in rows.label])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(PERCENT)


def _complete(scene: PlotContext) -> pd.DataFrame:
    """mIoU, settings × the labels that have a figure in every one of them."""
    scores = scene.averages.pivot(index="setting", columns="label", values="miou").dropna(axis="columns")
    return scores.reindex(list(scene.titles))


def _ranks(scene: PlotContext) -> Iterator[Sheet]:
    """Each method's rank from setting to setting, and how much the orders of any two settings agree."""
    scores = _complete(scene)
    if scores.shape[0] < 2 or scores.shape[1] < 3:
        return
    ranks = scores.rank(axis="columns", ascending=False)
    names = [scene.titles[setting] for setting in ranks.index]
    size = max(2.6, 0.24 * ranks.shape[1] + 0.8)
    figure = _figure(10.2, size + 1.0)
    paths, agreement = figure.subplots(1, 2, width_ratios=[1.6, 1])
    for label, line in ranks.items():
        look = scene.looks[label]
        paths.plot(
            range(len(line)), line, color=look.colour, marker=look.marker, linestyle=look.line, markersize=5 * look.size
        )
        paths.annotate(
            shortened(label, 24), (len(line) - 1, line.iloc[-1]), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=7, color=look.colour,
        )  # fmt: skip
    paths.set(title="Rank in each setting", ylim=(ranks.shape[1] + 0.5, 0.5), ylabel="rank by mean mIoU")
    paths.yaxis.set_major_locator(MaxNLocator(integer=True))
    agreement.set_title("Kendall's τ between settings")
    agreement.set(xlim=(-0.5, len(ranks) - 0.5), ylim=(len(ranks) - 0.5, -0.5), aspect="equal")
    agreement.grid(visible=False)
    for i, j in itertools.product(range(len(ranks)), repeat=2):
        tau = kendall_tau(ranks.iloc[i], ranks.iloc[j]) if i != j else 1.0
        colour = HUES[0] if tau >= 0 else HUES[1]
        agreement.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=colour, alpha=0.75 * abs(tau), linewidth=0))
        if len(ranks) <= PANELS:
            agreement.text(j, i, f"{tau:.2f}", ha="center", va="center", fontsize=7)
    for axes in (paths, agreement):
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor", fontsize=6.5)
    agreement.set_yticks(range(len(names)), names, fontsize=6.5)
    left_out = scene.averages.label.nunique() - ranks.shape[1]
    yield Sheet(
        "rank-stability",
        "statistics",
        "Rank stability",
        f"Ranks of the mean mIoU over {scene.seeds()}, among the {ranks.shape[1]} methods that have a figure in every "
        f"setting{f' ({left_out} have not)' if left_out else ''}. τ is 1 where two settings order them alike, 0 where "
        "they have nothing to do with each other, −1 where one is the other's reverse.",
        figure,
    )


def _critical_differences(scene: PlotContext) -> Iterator[Sheet]:
    """Demšar's diagram (JMLR 7, 2006): mean ranks over settings, joined where Nemenyi's test finds no difference."""
    scores = _complete(scene)
    if scores.shape[0] < 3 or scores.shape[1] < 3:
        return
    numbers = range(scores.shape[1])  # in place of names: the library walks through sets of them
    ranks = pd.Series(scores.rank(axis="columns", ascending=False).mean().to_numpy(), index=numbers)
    tested = scikit_posthocs.posthoc_nemenyi_friedman(scores.to_numpy())
    friedman = stats.friedmanchisquare(*scores.to_numpy().T)
    figure = _figure(8.4, 0.9 + 0.17 * scores.shape[1])
    axes = figure.subplots()
    look = [scene.looks[label] for label in scores.columns]
    drawn = scikit_posthocs.critical_difference_diagram(
        ranks, tested, ax=axes, label_fmt_left="{label}", label_fmt_right="{label}",
        color_palette=dict(enumerate(one.colour for one in look)), crossbar_props={"color": MUTED, "linewidth": 2.2},
        label_props={"fontsize": 7.5}, marker_props={"s": 16}, text_h_margin=0.12,
    )  # fmt: skip
    for text in drawn["labels"]:
        number = int(text.get_text())
        text.set_text(f" {shortened(scores.columns[number], 24)}  {ranks[number]:.2f} ")
    axes.grid(visible=False)
    yield Sheet(
        "critical-difference",
        "statistics",
        "Mean rank over all settings",
        f"Mean rank over {scores.shape[0]} settings, 1 is best. Methods under one bar: no significant difference "
        f"(Nemenyi, 5 %). Friedman's test over all of them: p = {friedman.pvalue:.3g}.",
        figure,
    )


def _curves(scene: PlotContext, curves: pd.DataFrame) -> Iterator[Sheet]:
    points = curves.merge(scene.runs[["fingerprint", "setting", "label"]], on="fingerprint")
    for column, title, axis in (
        ("miou_train", "mIoU while training", "mIoU of the training crops, %"),
        ("loss", "Loss while training", "loss"),
    ):
        known = points.dropna(subset=[column])
        if known.empty:
            continue
        means = known.groupby(["setting", "label", "step"])[column].mean().reset_index()
        for number, figure, panels in _panels(scene.titles, 2.6, top=_legend_height(scene)):
            for setting, axes in panels.items():
                for label, line in means[means.setting == setting].groupby("label"):
                    look = scene.looks[label]
                    axes.plot(
                        line.step, line[column], color=look.colour, linestyle=look.line, linewidth=1.1,
                        marker=look.marker, markersize=4 * look.size, markevery=0.2, mec=PAPER, mew=0.4,
                    )  # fmt: skip
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
                if column == "miou_train":
                    axes.yaxis.set_major_formatter(PERCENT)
            _legend(figure, scene)
            figure.supxlabel("optimiser step", fontsize=8, color=MUTED)
            figure.supylabel(axis, fontsize=8, color=MUTED)
            yield Sheet(
                _numbered(f"curves-{column.replace('_', '-')}", number, scene.titles),
                "curves",
                title,
                f"Mean over {scene.seeds()}. Measured on the augmented crops that are trained on, so it is no estimate "
                "of the reported figure.",
                figure,
            )


def _legend(figure: Figure, scene: PlotContext) -> None:
    handles = [
        Line2D(
            [], [], color=look.colour, marker=look.marker, linestyle=look.line, markersize=5 * look.size, linewidth=1.1
        )
        for look in (scene.looks[label] for label in scene.labels)
    ]
    names = [shortened(label, 28) for label in scene.labels]
    figure.legend(handles, names, loc="upper left", ncols=LEGEND_COLUMNS, borderaxespad=0.2)


def _legend_height(scene: PlotContext) -> float:
    """In inches."""
    return 0.1 + 0.17 * math.ceil(len(scene.labels) / LEGEND_COLUMNS)


def _classes(scene: PlotContext, per_class: pd.DataFrame) -> Iterator[Sheet]:
    """Each class's IoU: a bar from the lowest to the highest method, and the methods on it."""
    scores = per_class.merge(scene.runs[["fingerprint", "setting", "label"]], on="fingerprint")
    height = 0.7 + 0.2 * min(CLASSES, scores.groupby("setting")["index"].nunique().max())
    left = _room_for(shortened(name, 20) for name in scores.name.unique())
    for number, figure, panels in _panels(scene.titles, height, 3 + left, left, top=_legend_height(scene)):
        cut = 0
        for setting, axes in panels.items():
            here = scores[scores.setting == setting]
            names = here.drop_duplicates("index").set_index("index").name
            table = here.groupby(["index", "label"]).iou.mean().unstack()
            spread = (table.max(axis="columns") - table.min(axis="columns")).fillna(-1)
            kept = sorted(spread.sort_values(ascending=False, kind="stable").index[:CLASSES])
            cut = max(cut, len(table) - len(kept))
            _classes_panel(axes, table.loc[kept], scene.looks)
            axes.set_yticks(range(len(kept)), [shortened(names[index], 20) for index in kept])
        figure.supxlabel("IoU, %", fontsize=8, color=MUTED)
        _legend(figure, scene)
        yield Sheet(
            _numbered("classes", number, scene.titles),
            "classes",
            "IoU of each class",
            f"Mean over {scene.seeds()}; a bar reaches from the lowest method to the highest. A class in neither "
            "the labels nor the predictions is absent, and left out of the mIoU."
            + (f" Of many classes the {CLASSES} on which the methods differ most." if cut else ""),
            figure,
        )


def _classes_panel(axes: Axes, table: pd.DataFrame, looks: Mapping[str, SeriesStyle]) -> None:
    places = np.arange(len(table))
    low, high = table.min(axis="columns"), table.max(axis="columns")
    axes.barh(places, high - low, 0.5, left=low, color=GRID)
    for label, values in table.items():
        look = looks[label]
        axes.plot(values, places, look.marker, color=look.colour, markersize=4.5 * look.size, mec=PAPER, mew=0.4)
    for place in places[table.isna().all(axis="columns")]:
        axes.text(0.02, place, "absent", va="center", fontsize=7, color=MUTED, transform=axes.get_yaxis_transform())
    axes.use_sticky_edges = False
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PERCENT)


def _searches(searches: list[SearchRecord]) -> Iterator[Sheet]:
    for search in searches:
        trials = search.trials.assign(value=[values[0] if values else None for values in search.trials["values"]])
        objective = OBJECTIVES.get(search.definition["objectives"][0])
        if trials.empty or objective is None:
            continue
        method = search.definition["method"]
        colour = looks({method: method})[method].colour
        figure = _figure(9.4, 2.7)
        history, shares = figure.subplots(1, 2, width_ratios=[1.5, 1])
        complete = trials[trials.state == "complete"].dropna(subset=["value"]).sort_values("number")
        history.plot(complete.number, complete.value, "o", color=colour, markersize=4, label="complete")
        best = complete.value.cummax() if objective.better == "higher" else complete.value.cummin()
        history.plot(complete.number, best, color=colour, linewidth=1.2, drawstyle="steps-post", label="best so far")
        for state, marker in (("pruned", "|"), ("failed", "x")):
            numbers = trials.number[trials.state == state]
            if len(numbers):
                places = np.full(len(numbers), 0.03)
                at_foot = history.get_xaxis_transform()
                history.plot(numbers, places, marker, transform=at_foot, color=MUTED, markersize=5, label=state)
        history.set(title="History", xlabel="trial", ylabel=f"{objective.label} on the dev part")
        history.xaxis.set_major_locator(MaxNLocator(integer=True))
        history.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2)
        importances = sorted(search.importances.items(), key=lambda item: (item[1], item[0]))
        shares.barh(range(len(importances)), [share for _, share in importances], color=colour, height=0.6)
        shares.set_yticks(range(len(importances)), [shortened(name, 24) for name, _ in importances])
        shares.set(title="Importance", xlabel="share of the variance explained")
        shares.grid(axis="y", visible=False)
        if not importances:
            shares.text(0.5, 0.5, "not computed", transform=shares.transAxes, ha="center", color=MUTED)
        counts = ", ".join(f"{count} {state}" for state, count in trials.state.value_counts().sort_index().items())
        yield Sheet(
            f"search-{_slug(search.name)}",
            "searches",
            f"Search: {shortened(search.name, 80)}",
            f"{len(trials)} trials ({counts}), each scored on a dev part that is held out of train.",
            figure,
        )


def _slug(text: str) -> str:
    """A file's name that is safe everywhere."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:120] or "x"
