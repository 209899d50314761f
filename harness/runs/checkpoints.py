"""Checkpoints of a run: one file, named by its step and its own digest, so that a damaged one is recognised."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.util.files import atomically, sha256


class Checkpoints:
    """States to go on from: one file, named by its step and its own digest, so that a damaged one is known as such."""

    def __init__(self, folder: Path, before_writing: Callable[[], None] = lambda: None):
        self.folder = folder
        self._before_writing = before_writing

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps; the one before is removed only when this one is whole."""
        import torch

        self._before_writing()
        older = self._files()
        staged = self.folder / "staged.pt"
        with atomically(staged) as temporary:
            torch.save(state, temporary)
        target = self.folder / f"{step:09d}-{sha256(staged)[:16]}.pt"
        staged.rename(target)
        for path in older:
            if path != target:
                path.unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The last whole state and its step. Damaged files are moved aside as `*.damaged`."""
        import torch

        for path in reversed(self._files()):
            step, _, digest = path.stem.partition("-")
            if sha256(path).startswith(digest):
                return int(step), torch.load(path, map_location="cpu", weights_only=True)
            path.rename(path.with_suffix(".damaged"))
        return None

    def damaged(self) -> list[Path]:
        """What `latest` moved aside."""
        return sorted(self.folder.glob("*.damaged"))

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("?????????-????????????????.pt"))
