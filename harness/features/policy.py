"""Decides whether a run adds its frozen features to the cache, by the time saved and the space needed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from harness.features.store import CHUNK, FeatureStream

EVALUATION_SHARE = 0.25
"""The largest share of the cache's limit that one run's evaluation may add."""


class WritePolicy(Protocol):
    """Decides for each forward pass whether its outputs are written."""

    writes: bool
    """Once False, nothing more is written."""

    def write(self, stream: FeatureStream, index: int, tensors: Mapping[str, tuple[Tensor, float]]) -> None:
        """Write the outputs of pass `index`: by name the tensor and its seconds. Only called while `writes`."""


class EvaluationCachePolicy:
    """Write until one evaluation has taken its share of the limit."""

    def __init__(self, limit: int):
        """`limit`: bytes that the whole cache may take."""
        self._left = int(limit * EVALUATION_SHARE)
        self.writes = self._left > 0

    def write(self, stream: FeatureStream, index: int, tensors: Mapping[str, tuple[Tensor, float]]) -> None:
        self._left -= sum(tensor.nbytes for tensor, _ in tensors.values())
        self.writes = self._left > 0 and stream.write(index, tensors)


@dataclass
class FeatureCachePolicy:
    """Write the outputs for training images as long as that saves time.

    The costs of computing, writing and reading are measured during the first chunk of passes.
    """

    limit: int
    """Bytes that the whole cache may take; one run's training takes half of them at most."""
    expected_reuses: int
    """How many further runs are expected that see the same images."""
    passes: int
    """Forward passes of the whole training."""
    say: Callable[[str], None]
    writes: bool = field(init=False)
    _bytes: int = 0
    _writing: float = 0.0
    _computing: float = 0.0
    _seen: int = 0

    def __post_init__(self) -> None:
        self.writes = self.expected_reuses > 0 and self.limit > 0

    def write(self, stream: FeatureStream, index: int, tensors: Mapping[str, tuple[Tensor, float]]) -> None:
        size = sum(tensor.nbytes for tensor, _ in tensors.values())
        if not self._seen and (expected := size * (self.passes - index)) > self.limit / 2:
            self._stop(f"{_bytes(expected)} would be more than half of --cache-size")
            return
        started = time.monotonic()
        written = stream.write(index, tensors)
        self._writing += time.monotonic() - started
        self._bytes += size
        if self._seen:  # the first pass also warms up
            self._computing += sum(seconds for _, seconds in tensors.values())
        self._seen += 1
        if not written:
            self._stop("they could not be written")
        elif (index + 1) % CHUNK == 0 and self._seen <= 2 * CHUNK:
            self._decide(stream, index, list(tensors))

    def _decide(self, stream: FeatureStream, index: int, names: list[str]) -> None:
        started = time.monotonic()
        found = stream.read(index, names)
        if found is None:
            return
        reading = time.monotonic() - started
        computing = self._computing / max(1, self._seen - 1)
        writing = self._writing / self._seen
        costs = f"computing {computing:.3f} s a pass, reading {reading:.3f} s, writing {writing:.3f} s"
        if self.expected_reuses * (computing - reading) <= writing:
            self._stop(costs)
        elif self._seen <= CHUNK:
            size = _bytes(self._bytes / self._seen * self.passes)
            self.say(f"caching the frozen stages' outputs of the training images for other runs: {size}; {costs}")

    def _stop(self, reason: str) -> None:
        self.writes = False
        self.say(f"not caching the frozen stages' outputs of the training images: {reason}")


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{math.ceil(number / 1e6)} MB"
