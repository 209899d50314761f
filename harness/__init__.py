"""Adapt one frozen, pre-trained backbone to one segmentation dataset with one method under one fixed budget.

The public names: `run` executes one cell, `RunStore` reads finished ones, `Spec` is what was run; a tuning method is a
subclass of `Method` with `hyperparameter`s, and may be `Unsupported` on a backbone. They are imported when first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from harness.engine.options import ExecutionOptions
    from harness.method import Method, Unsupported, hyperparameter
    from harness.runs.result import RunResult
    from harness.runs.store import RunStore
    from harness.spec import Budget, Spec

__version__ = "0.1.0"
__all__ = ["Method", "RunStore", "Spec", "Unsupported", "hyperparameter", "run"]

_MODULES = {
    "Method": "harness.method",
    "RunStore": "harness.runs.store",
    "Spec": "harness.spec",
    "Unsupported": "harness.method",
    "hyperparameter": "harness.method",
}


def run(
    *,
    method: str = "spm",
    backbone: str = "tf_efficientnet_lite0",
    weights: str = "auto",
    dataset: str = "landcover",
    head: str = "fpn",
    budget: str | Budget = "demo",
    seed: int = 0,
    part: Literal["report", "dev"] = "report",
    settings: Mapping[str, Any] | None = None,
    options: ExecutionOptions | None = None,
    force: bool = False,
    quiet: bool = True,
) -> RunResult:
    """Train and score one cell as `harness run` does: resume an interrupted run, or return a finished one's result.

    `settings` are hyperparameters that differ from the method's defaults; `options` say where runs and data are and how
    the run is executed. `force` reruns a finished run from the start. Without `quiet` a terminal shows a progress bar.

    Raises `harness.errors.UserError`, which names the argument, for a value that is wrong, and
    `harness.runs.state.RunEnded` for a run that ends without a result.
    """
    from harness.cells import plugins
    from harness.cells.resolve import Request, resolve
    from harness.engine.options import ExecutionOptions
    from harness.engine.run import execute

    options = options or ExecutionOptions()
    plugins.load(options.plugins)
    store = options.open_store()
    request = Request(method, backbone, weights, dataset, head, budget, seed, part, dict(settings or {}))
    cell = resolve(request, store, options.data)
    return execute(cell, store, options, force=force, quiet=quiet).read_result()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
