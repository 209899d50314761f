"""Every plot of a report, as PNG, SVG and PDF: trade-offs, comparisons, learning curves, classes, searches.

Each plot's caption explains its points and bars. The same runs give the same bytes: nothing depends on the clock, the
machine's speed or randomness.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pandas as pd

from harness.runs.result import COSTS
from reports.analysis.comparison import Comparison
from reports.read.collect import Collected
from reports.render.plots.classes import class_scores
from reports.render.plots.comparisons import (
    critical_difference,
    dev_against_test,
    differences,
    heads_and_methods,
    rank_stability,
)
from reports.render.plots.context import RC, Plot, PlotContext, setting_titles
from reports.render.plots.curves import learning_curves
from reports.render.plots.saving import SavedPlot, save_all
from reports.render.plots.searches import search_histories
from reports.render.plots.tradeoff import tradeoff
from reports.render.style import styles_of


def draw_all(collected: Collected, published: pd.DataFrame, comparison: Comparison, folder: Path) -> list[SavedPlot]:
    """Draw into `folder` every plot that the runs have data for.

    `published` has one row per published score that belongs to one of the settings; `comparison` is in mIoU.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with mpl.rc_context({**mpl.rcParamsDefault, **RC}):
        return save_all(draw(collected, published, comparison), folder)


def draw(collected: Collected, published: pd.DataFrame, comparison: Comparison) -> Iterator[Plot]:
    """The plots of `draw_all`, not yet saved; with matplotlib's current settings."""
    runs = collected.finished
    if not runs.empty:
        context = PlotContext(runs, styles_of(collected.reported, published), setting_titles(runs))
        for cost in COSTS.values():
            if cost.plotted:
                yield from tradeoff(context, cost, published)
        yield from differences(context, comparison.significance)
        yield from dev_against_test(context, comparison.dev_test)
        yield from heads_and_methods(context)
        yield from rank_stability(context)
        yield from critical_difference(context)
        yield from learning_curves(context, collected.curves)
        yield from class_scores(context, collected.per_class)
    yield from search_histories(collected.searches)
