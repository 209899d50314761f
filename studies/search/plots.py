"""Plots of a search: Optuna's own, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.util.files import atomically
from studies.search.spec import OBJECTIVES, SearchSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna import Study
    from optuna.importance import BaseImportanceEvaluator


def draw(spec: SearchSpec, study: Study, evaluator: BaseImportanceEvaluator | None, folder: Path) -> list[Path]:
    """Write the plots for which there are enough trials, as PNG.

    For each objective the history and a slice through each hyperparameter; the importances where there is an
    `evaluator`; the Pareto front of two or three objectives.
    """
    import matplotlib
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as plots

    if not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        return []
    several = len(spec.objectives) > 1
    wide = (2.6 * max(2, len(spec.space)), 3.6)
    drawings: dict[str, tuple[Callable[[], Any], tuple[float, float]]] = {}
    for index, name in enumerate(spec.objectives):
        suffix = f"-{name}" if several else ""
        target: dict[str, Any] = {"target_name": OBJECTIVES[name].label}
        if several:
            target["target"] = lambda trial, index=index: trial.values[index]
        drawings[f"history{suffix}"] = partial(plots.plot_optimization_history, study, **target), (7, 4)
        drawings[f"slice{suffix}"] = partial(plots.plot_slice, study, **target), wide
    if evaluator is not None:
        drawings["importances"] = lambda: plots.plot_param_importances(study, evaluator=evaluator), (7, 4)
    if several and len(spec.objectives) <= 3:
        names = [OBJECTIVES[name].label for name in spec.objectives]
        drawings["front"] = lambda: plots.plot_pareto_front(study, target_names=names), (7, 5)

    before = matplotlib.get_backend()
    matplotlib.use("agg")  # never a window, regardless of the user's configuration
    try:
        with matplotlib.rc_context():
            return [_save(plot, size, folder / f"{name}.png") for name, (plot, size) in drawings.items()]
    finally:
        matplotlib.use(before)


def _save(plot: Callable[[], Any], size: tuple[float, float], path: Path) -> Path:
    import numpy as np
    from matplotlib import pyplot

    panels = np.ravel(plot())
    for axes in panels:
        if axes.get_xscale() == "log":
            _space_out(axes)
        elif axes.xaxis.have_units():  # categories
            axes.tick_params(axis="x", labelrotation=90)
    figure = panels[0].get_figure()
    figure.set_size_inches(size)
    with atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _space_out(axes: Axes) -> None:
    """Put labels at powers of ten, on a short axis also at 2 and 5 times these: matplotlib's own labels overlap."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    low, high = axes.get_xlim()
    axes.xaxis.set_minor_formatter(NullFormatter())
    if high < 100 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
