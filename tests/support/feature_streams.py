"""Tensors of a feature store that are known by their pass, and what is on its disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from harness.features.store import CHUNK, FeatureStore, FeatureStream

LARGE = 1 << 30
IDENTITY = {"backbone": "resnet10t"}


def feature(index: int, name: str = "0", size: int = 256, salt: int = 0) -> Tensor:
    """The output of a pass under a name: float32 [size], different for each pass, name and salt."""
    generator = torch.Generator().manual_seed(hash((index, int(name), salt)))
    return torch.rand(size, generator=generator)


def fill(stream: FeatureStream, passes: range, name: str = "0", size: int = 256, salt: int = 0) -> list[bool]:
    return [stream.write(index, {name: (feature(index, name, size, salt), 0.5)}) for index in passes]


def found(stream: FeatureStream, passes: range, name: str = "0", size: int = 256, salt: int = 0) -> list[int]:
    """The passes that can be read. Fails if one comes with anything but its own tensor."""
    indices = []
    for index in passes:
        cached = stream.read(index, [name])
        if cached is not None:
            assert torch.equal(cached[name].tensor, feature(index, name, size, salt)), f"pass {index} is wrong"
            indices.append(index)
    return indices


def files(folder: Path) -> list[Path]:
    """All files except the lock."""
    return sorted(path for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def bytes_used(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def file_size(folder: Path, size: int = 256) -> int:
    """Bytes of one whole file of `feature`s."""
    with FeatureStore(folder, LARGE).stream(IDENTITY, CHUNK) as stream:
        fill(stream, range(CHUNK), size=size)
    used = bytes_used(folder)
    shutil.rmtree(folder)
    return used
