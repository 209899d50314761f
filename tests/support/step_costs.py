"""The cost of a step, which takes longer to count than a tiny run to train: counted once per session.

A run keeps it in the cache of its `--runs` folder, under all that it depends on. Tests have a folder each; what one
run has counted is put into the caches of the next.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

VARIABLE = "TESTS_STEP_COSTS"
"""Of the environment: the folder of all workers of the session."""


def lend(runs: Path) -> None:
    """Put what was counted so far into the cache of a `--runs` folder."""
    _copy(Path(os.environ[VARIABLE]), runs / ".cache")


def keep(runs: Path) -> None:
    """Keep what runs in the folder have counted."""
    _copy(runs / ".cache", Path(os.environ[VARIABLE]))


def _copy(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # such as a full disk
        for path in source.glob("step-*.json"):
            if not (target / path.name).exists():
                target.mkdir(parents=True, exist_ok=True)
                part = target / f".{path.name}.{os.getpid()}"
                try:
                    shutil.copy(path, part)
                    part.replace(target / path.name)
                finally:
                    part.unlink(missing_ok=True)
