"""The trade-off plots: mIoU against a cost, one plot per cost, one panel per setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from harness.runs.result import Measure, Unit
from reports.analysis.statistics import pareto_front
from reports.read.frames import rows_of
from reports.render.numbers import SIZES
from reports.render.plots.context import BARS, DPI, PERCENT, Plot, PlotContext, numbered, panels, shortened
from reports.render.style import LINES, MUTED, PAPER, SeriesStyle


def axis_scale(cost: Measure) -> float:
    """The divisor of a value on an axis: bytes are shown in MiB."""
    return SIZES["MiB"] if cost.unit == "bytes" else 1


def tradeoff(context: PlotContext, cost: Measure, published: pd.DataFrame) -> Iterator[Plot]:
    rows = context.averages.dropna(subset=[cost.key])
    cited = published[published.head_counted == cost.head_counted] if cost.head_counted is not None else published[:0]
    cited = cited.dropna(subset=["trained", "value"])
    if rows.empty or (cost.head_counted and cited.empty):
        return  # the head is the same for all: counting it only matters for published scores that count it
    logarithmic = cost.head_counted is not None or rows[cost.key].max() > 10 * rows[cost.key].min() > 0
    scale = (
        f" (log{', 0 left of the break' if logarithmic and (rows[cost.key] == 0).any() else ''})" if logarithmic else ""
    )
    for number, figure, panel in panels(context.titles, 3.1):
        texts = {
            setting: _tradeoff_panel(
                axes, rows[rows.setting == setting], cited[cited.setting == setting], cost, logarithmic, context.styles
            )
            for setting, axes in panel.items()
        }
        figure.supxlabel(cost.axis + scale, fontsize=8, color=MUTED)
        figure.supylabel("mIoU, %", fontsize=8, color=MUTED)
        _spread_labels(figure, {axes: texts[setting] for setting, axes in panel.items()})
        has_cited = cited.setting.isin(list(panel)).any()
        yield Plot(
            numbered(f"tradeoff-{cost.key.replace('_', '-')}", number, context.titles),
            "tradeoff",
            f"mIoU against {cost.title}",
            f"Mean over {context.seeds()}; {BARS}. Line: the Pareto front; no measured method has a higher mIoU at "
            "the same or a lower cost. Dashed: full fine-tuning; dotted: the head alone."
            + (" Hollow markers: published scores." if has_cited else ""),
            figure,
        )


def _tradeoff_panel(
    axes: Axes,
    rows: pd.DataFrame,
    cited: pd.DataFrame,
    cost: Measure,
    logarithmic: bool,
    styles: Mapping[str, SeriesStyle],
) -> list[Text]:
    """Draw the points of one setting; returns the labels, which still overlap."""
    x = rows[cost.key] / axis_scale(cost)
    _set_scale(axes, x if cited.empty else pd.concat([x, cited.trained]), logarithmic, cost.unit)
    for label, dashes in LINES.items():
        for value in rows.miou[rows.label == label]:
            axes.axhline(value, color=MUTED, linewidth=0.8, linestyle=(0, dashes), zorder=1)
    front = rows.assign(x=x)[pareto_front(rows[cost.key].to_numpy(), rows.miou.to_numpy())].sort_values("x")
    axes.plot(front.x, front.miou, color=MUTED, linewidth=1.0, alpha=0.7, drawstyle="steps-post", zorder=1.5)
    colours = [styles[label].colour for label in rows.label]
    axes.vlines(x, rows.miou - rows.bar, rows.miou + rows.bar, colors=colours, linewidth=1.1, zorder=2)
    texts = []
    for row, at in zip(rows_of(rows), x, strict=True):
        style = styles[row.label]
        axes.plot(
            at, row.miou, style.marker, color=style.colour, markersize=5.5 * style.size, mec=PAPER, mew=0.5, zorder=3
        )
        # Paper behind the label fades the lines, zorder 1 to 1.5, but neither bars nor points.
        texts.append(
            axes.text(
                at, row.miou, shortened(row.label, 24), fontsize=7, color=style.colour, zorder=1.8,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4, "alpha": 0.75},
            )
        )  # fmt: skip
    for row in rows_of(cited):
        style, at = styles[row.method], (row.trained, row.value)
        axes.plot(*at, style.marker, mfc="none", mec=style.colour, markersize=6 * style.size, mew=1.0, zorder=2)
        texts.append(axes.text(*at, shortened(row.label, 24), fontsize=6.5, color=MUTED))
    axes.margins(x=0.08, y=0.12)
    axes.yaxis.set_major_formatter(PERCENT)
    return texts


def _set_scale(axes: Axes, values: pd.Series, logarithmic: bool, unit: Unit) -> None:
    """Set a linear or logarithmic scale; the latter shows methods without trained parameters at 0, left of a break."""
    written = EngFormatter(sep="") if unit == "count" else FuncFormatter(lambda value, _: f"{value:g}")
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
    """Move labels off the points and off each other, in a fixed number of rounds, so that the result is deterministic.

    A line connects a label to its point if they are far apart.
    """
    hidden = [
        artist
        for axes, own in texts.items()
        for artist in (axes, *axes.get_children())
        if artist not in own and artist.get_visible()
    ]
    for artist in hidden:
        artist.set_visible(False)  # adjustText draws the figure to measure the labels of one panel
    lines: list[tuple[Axes, np.ndarray, np.ndarray]] = []
    for axes, own in texts.items():
        axes.set_visible(True)
        lines += _spread(axes, own)
        axes.set_visible(False)
    for artist in hidden:
        artist.set_visible(True)
    for axes, start, end in lines:
        axes.plot(*zip(start, end, strict=True), color=MUTED, linewidth=0.4, zorder=1.2, scalex=False, scaley=False)


def _along_bars(axes: Axes) -> Iterator[np.ndarray]:
    """Points [9, 2] along each error bar."""
    for collection in axes.collections:
        if isinstance(collection, LineCollection):
            for segment in collection.get_segments():
                if len(segment) and np.isfinite(segment).all():  # one seed has no bar
                    yield np.linspace(segment[0], segment[-1], 9)


def _spread(axes: Axes, texts: list[Text]) -> Iterator[tuple[Axes, np.ndarray, np.ndarray]]:
    if not texts:
        return
    points = np.array([text.get_position() for text in texts])
    avoided = np.concatenate([points, *_along_bars(axes)])
    for text, point in zip(texts, points, strict=True):  # begin right of the marker, clear of its bar
        x, y = axes.transData.transform(point)
        text.set_position(tuple(axes.transData.inverted().transform((x + 0.05 * DPI, y + 0.01 * DPI))))
    adjust_text(
        texts, ax=axes, x=avoided[:, 0], y=avoided[:, 1], iter_lim=100, expand=(1.2, 1.5), force_text=(0.2, 0.35),
        max_move=(12, 12), prevent_crossings=False, avoid_self=False,
    )  # fmt: skip
    for text, point in zip(texts, points, strict=True):
        box, end = text.get_window_extent(), axes.transData.transform(point)
        start = np.clip(end, box.min, box.max)
        if np.linalg.norm(start - end) > 0.2 * DPI:
            yield axes, axes.transData.inverted().transform(start), point
