"""What takes long to make and is only read: made by the first worker of the session that needs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, which `make` has filled. Tests must not change it."""
    with FileLock(f"{folder}.lock"):
        done = folder.with_name(f"{folder.name}.done")
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
