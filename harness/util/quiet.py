"""Imports mmcv and mmseg without their messages about missing extras and without a slow import that is not used."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Suppress prints and warnings of the imports inside; stdout and the warning filters are restored afterwards.

    stderr is not redirected: loggers that torch creates during its import would keep the replacement and lose every
    later warning. Exceptions are not suppressed.
    """
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()), _without("transformers"):
        yield


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Make a module look missing, unless it is already imported.

    mmengine imports one optimiser from transformers if that is installed, as with peft. It is not used here, and takes
    a third of the time of a run's imports.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
