"""Importing mmcv and mmseg without what they print about optional parts that are absent."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Swallow prints and warnings of the imports inside; stdout and the filters are as before afterwards.

    stderr is not replaced: the loggers that torch creates while it is imported would keep the replacement,
    and with it lose every later warning. Exceptions pass: an import that fails is a matter for the caller.
    """
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        yield
