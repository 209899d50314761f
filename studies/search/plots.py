"""Pictures of a search: Optuna's own plots, on matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.util.files import atomically
from studies.search.spec import OBJECTIVES, SearchSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna import Study
    from optuna.importance import BaseImportanceEvaluator


def draw(spec: SearchSpec, study: Study, evaluator: BaseImportanceEvaluator | None, folder: Path) -> list[Path]:
    """Write the pictures that the trials suffice for: the history and a slice through each hyperparameter for each
    objective, the importances (where there is an `evaluator`), and the Pareto front of two or three objectives.
    """
    import matplotlib
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as plots

    if not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        return []
    several = len(spec.objectives) > 1
    wide = (2.6 * max(2, len(spec.space)), 3.6)
    pictures: dict[str, tuple[Callable[[], Any], tuple[float, float]]] = {}
    for index, name in enumerate(spec.objectives):
        suffix = f"-{name}" if several else ""
        target: dict[str, Any] = {"target_name": OBJECTIVES[name].unit}
        if several:
            target["target"] = lambda trial, index=index: trial.values[index]
        pictures[f"history{suffix}"] = lambda target=target: plots.plot_optimization_history(study, **target), (7, 4)
        pictures[f"slice{suffix}"] = lambda target=target: plots.plot_slice(study, **target), wide
    if evaluator is not None:
        pictures["importances"] = lambda: plots.plot_param_importances(study, evaluator=evaluator), (7, 4)
    if several and len(spec.objectives) <= 3:
        names = [OBJECTIVES[name].unit for name in spec.objectives]
        pictures["front"] = lambda: plots.plot_pareto_front(study, target_names=names), (7, 5)

    before = matplotlib.get_backend()
    matplotlib.use("agg")  # a window is never wanted, whatever the user's own choice
    try:
        with matplotlib.rc_context():
            return [_save(plot, size, folder / f"{name}.png") for name, (plot, size) in pictures.items()]
    finally:
        matplotlib.use(before)


def _save(plot: Callable[[], Any], size: tuple[float, float], path: Path) -> Path:
    import numpy as np
    from matplotlib import pyplot

    every = np.ravel(plot())
    for axes in every:
        if axes.get_xscale() == "log":
            _space_out(axes)
        elif axes.xaxis.have_units():  # choices, as words
            axes.tick_params(axis="x", labelrotation=90)
    figure = every[0].get_figure()
    figure.set_size_inches(size)
    with atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _space_out(axes: Axes) -> None:
    """Labels at powers of ten, or at 1, 2 and 5 within few of them: matplotlib's own run into each other here."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    low, high = axes.get_xlim()
    axes.xaxis.set_minor_formatter(NullFormatter())
    if high < 100 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
