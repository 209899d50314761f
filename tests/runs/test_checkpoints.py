"""Checkpoints: the newest usable one is loaded, and other files in the folder do no harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.runs.checkpoints import Checkpoints
from harness.util.files import sha256


def state(value: float) -> dict[str, Any]:
    return {"trained": {"w": torch.tensor(value)}, "optimizer": {}, "precision": {}, "meters": {"seconds": value}}


def put(folder: Path, step: int, content: object) -> Path:
    """A file with the name of a checkpoint that fits its content."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / "staged"
    torch.save(content, staged)
    return staged.rename(folder / f"{step:09d}-{sha256(staged)[:16]}.pt")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoint", fingerprint="a" * 16)


def test_newest_checkpoint_is_loaded_and_replaces_the_older(checkpoints: Checkpoints) -> None:
    for step in (5, 10):
        checkpoints.save(step, state(step))
    assert checkpoints.latest() == (10, state(10))
    assert len(list(checkpoints.folder.iterdir())) == 1
    checkpoints.clear()
    assert checkpoints.latest() is None


def test_checkpoint_of_an_earlier_version_is_loaded(checkpoints: Checkpoints) -> None:
    put(checkpoints.folder, 7, state(7))
    assert checkpoints.latest() == (7, state(7))


def truncated(folder: Path) -> None:
    path = put(folder, 9, state(9))
    path.write_bytes(path.read_bytes()[:-10])


def not_of_torch(folder: Path) -> None:
    path = folder / "staged"
    path.write_bytes(b"no checkpoint")
    path.rename(folder / f"{9:09d}-{sha256(path)[:16]}.pt")


CORRUPT: dict[str, Callable[[Path], object]] = {
    "truncated": truncated,
    "not of torch": not_of_torch,
    "a folder": lambda folder: (folder / f"{9:09d}-{'0' * 16}.pt").mkdir(),
    "not a dictionary": lambda folder: put(folder, 9, [1, 2]),
    "a key is missing": lambda folder: put(folder, 9, {"trained": {}}),
    "another key": lambda folder: put(folder, 9, {**state(9), "more": 1}),
    "another step": lambda folder: put(folder, 9, {**state(9), "step": 8, "fingerprint": "a" * 16}),
    "another run": lambda folder: put(folder, 9, {**state(9), "step": 9, "fingerprint": "b" * 16}),
}


@pytest.mark.parametrize("corrupt", CORRUPT)
def test_corrupt_checkpoint_falls_back_to_the_previous_one(checkpoints: Checkpoints, corrupt: str) -> None:
    checkpoints.save(5, state(5))
    CORRUPT[corrupt](checkpoints.folder)
    assert checkpoints.latest() == (5, state(5))
    (damaged,) = checkpoints.damaged()
    assert damaged.name.startswith(f"{9:09d}-")


def test_forbidden_checkpoint_is_not_written(tmp_path: Path) -> None:
    def forbid() -> None:
        raise PermissionError

    checkpoints = Checkpoints(tmp_path / "checkpoint", forbid)
    with pytest.raises(PermissionError):
        checkpoints.save(1, state(1))
    assert not checkpoints.folder.exists()
