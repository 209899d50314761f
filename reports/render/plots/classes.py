"""The IoU of each class: which classes the methods differ on, and which are absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from reports.render.plots.context import (
    PERCENT,
    Plot,
    PlotContext,
    add_legend,
    label_width,
    legend_height,
    numbered,
    panels,
    shortened,
)
from reports.render.style import GRID, MUTED, PAPER, SeriesStyle

CLASSES = 30
"""The largest number of classes in a panel."""


def class_scores(context: PlotContext, per_class: pd.DataFrame) -> Iterator[Plot]:
    """One bar per class from the lowest to the highest method, with the methods on it."""
    scores = per_class.merge(context.runs[["fingerprint", "setting", "label"]], on="fingerprint")
    height = 0.7 + 0.2 * min(CLASSES, scores.groupby("setting")["index"].nunique().max())
    left = label_width(shortened(name, 20) for name in scores.name.unique())
    for number, figure, panel in panels(context.titles, height, 3 + left, left, top=legend_height(context)):
        omitted = 0
        for setting, axes in panel.items():
            here = scores[scores.setting == setting]
            names = here.drop_duplicates("index").set_index("index").name
            table = here.groupby(["index", "label"]).iou.mean().unstack()
            spread = (table.max(axis="columns") - table.min(axis="columns")).fillna(-1)
            shown = sorted(spread.sort_values(ascending=False, kind="stable").index[:CLASSES])
            omitted = max(omitted, len(table) - len(shown))
            _classes_panel(axes, table.loc[shown], context.styles)
            axes.set_yticks(range(len(shown)), [shortened(names[index], 20) for index in shown])
        figure.supxlabel("IoU, %", fontsize=8, color=MUTED)
        add_legend(figure, context)
        yield Plot(
            numbered("classes", number, context.titles),
            "classes",
            "IoU of each class",
            f"Mean over {context.seeds()}; bars: from the lowest method to the highest. A class in neither the labels "
            "nor the predictions is absent and does not count in the mIoU."
            + (f" Only the {CLASSES} classes on which the methods differ most are shown." if omitted else ""),
            figure,
        )


def _classes_panel(axes: Axes, table: pd.DataFrame, styles: Mapping[str, SeriesStyle]) -> None:
    places = np.arange(len(table))
    low, high = table.min(axis="columns"), table.max(axis="columns")
    axes.barh(places, high - low, 0.5, left=low, color=GRID)
    for label, values in table.items():
        style = styles[label]
        axes.plot(values, places, style.marker, color=style.colour, markersize=4.5 * style.size, mec=PAPER, mew=0.4)
    for place in places[table.isna().all(axis="columns")]:
        axes.text(0.02, place, "absent", va="center", fontsize=7, color=MUTED, transform=axes.get_yaxis_transform())
    axes.use_sticky_edges = False
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PERCENT)
