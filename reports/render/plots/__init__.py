"""Every plot of a report, as files: trade-offs, comparisons, learning curves, classes, searches.

Each plot's caption explains its points and bars. The same runs give the same bytes: nothing depends on the clock, the
machine's speed or randomness.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
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
from reports.render.plots.saving import DEFAULT, FORMATS, SavedPlot, saving
from reports.render.plots.searches import search_histories
from reports.render.plots.tradeoff import tradeoff
from reports.render.style import styles_of

__all__ = ["DEFAULT", "FORMATS", "drawing", "sources"]


@contextlib.contextmanager
def drawing(
    collected: Collected,
    published: pd.DataFrame,
    comparison: Comparison,
    folder: Path,
    formats: Sequence[str] = DEFAULT,
) -> Iterator[Callable[[], list[SavedPlot]]]:
    """Draw into `folder` every plot that the runs have data for, while the caller continues.

    `published` has one row per published score that belongs to one of the settings; `comparison` is in mIoU. Yields a
    function that waits for the plots.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with (
        mpl.rc_context({**mpl.rcParamsDefault, **RC}),
        saving(sources(collected, published, comparison), folder, formats) as wait,
    ):
        yield wait


def sources(collected: Collected, published: pd.DataFrame, comparison: Comparison) -> list[Iterator[Plot]]:
    """The plots of `drawing`, by kind, none drawn yet; they use matplotlib's settings of when they are drawn."""
    runs = collected.finished
    found: list[Iterator[Plot]] = []
    if not runs.empty:
        context = PlotContext(runs, styles_of(collected.reported, published), setting_titles(runs))
        found += [tradeoff(context, cost, published) for cost in COSTS.values() if cost.plotted]
        found += [
            differences(context, comparison.significance),
            dev_against_test(context, comparison.dev_test),
            heads_and_methods(context),
            rank_stability(context),
            critical_difference(context),
            learning_curves(context, collected.curves),
            class_scores(context, collected.per_class),
        ]
    return [*found, search_histories(collected.searches)]
