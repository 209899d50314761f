"""Importing mmcv and mmseg without what they print about absent parts, and without a part that is not used."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Swallow prints and warnings of the imports inside; stdout and the filters are as before afterwards.

    stderr is not replaced: the loggers that torch creates while it is imported would keep the replacement,
    and with it lose every later warning. Exceptions pass: an import that fails is a matter for the caller.
    """
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()), _without("transformers"):
        yield


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Have a module look absent, unless it is imported already.

    mmengine takes one optimiser from transformers where that is installed, which peft sees to; it is not used here, and
    its import would be a third of all that a run imports.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
