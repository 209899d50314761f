"""Checkpoints of a run: one file, named by its step and its own digest, so that a damaged one is recognised.

`engine/training.py` decides what a checkpoint contains and when it is written.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.util.files import atomically, sha256

STATE_KEYS = frozenset({"trained", "optimizer", "precision", "meters"})
"""What a run resumes from."""


class Checkpoints:
    """The checkpoints of one run in a folder of their own. Only the newest is needed."""

    def __init__(self, folder: Path, before_writing: Callable[[], None] = lambda: None, fingerprint: str = ""):
        """`before_writing` may raise to prevent writing. `fingerprint`: only this run's checkpoints are loaded."""
        self.folder = folder
        self._before_writing = before_writing
        self._fingerprint = fingerprint

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps, with the keys `STATE_KEYS`; then remove older files."""
        import torch

        self._before_writing()
        older = self._files()
        staged = self.folder / "staged.pt"
        with atomically(staged) as temporary:
            torch.save({**state, "step": step, "fingerprint": self._fingerprint}, temporary)
        target = self.folder / f"{step:09d}-{sha256(staged)[:16]}.pt"
        staged.rename(target)
        for path in older:
            if path != target:
                path.unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest usable state and its step, or None. Unusable files are renamed to `*.damaged`."""
        for path in reversed(self._files()):
            loaded = self._load(path)
            if loaded is not None:
                return loaded
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".damaged"))
        return None

    def damaged(self) -> list[Path]:
        """The files that `latest` renamed."""
        return sorted(self.folder.glob("*.damaged"))

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self, path: Path) -> tuple[int, dict[str, Any]] | None:
        """None for a file whose digest differs from its name, or that is not a checkpoint of this run."""
        import torch

        name, _, digest = path.stem.partition("-")
        try:
            if not sha256(path).startswith(digest):
                return None
            state = torch.load(path, map_location="cpu", weights_only=True)
            step = int(name)
            # Older checkpoints do not have these two.
            own_step, fingerprint = state.pop("step", step), state.pop("fingerprint", self._fingerprint)
            usable = state.keys() == STATE_KEYS and own_step == step and fingerprint == self._fingerprint
        except MemoryError:
            raise
        except Exception:  # torch and pickle may raise anything for other files
            return None
        return (step, state) if usable else None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("?????????-????????????????.pt"))
