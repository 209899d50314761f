"""Whether a run adds its frozen features to the cache: decided by what it costs and saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from harness.features.store import CHUNK, FeatureStream


@dataclass
class FeatureCachePolicy:
    """Whether what a prefix makes of the training images is kept for others: decided by what it costs and saves.

    After the first chunk of passes, computing, writing and reading are known by measurement.
    """

    stream: FeatureStream
    limit: int
    """Bytes that all that is kept may take; one run's training takes half of them at most."""
    more: int
    """How many further runs are expected that see the same images."""
    passes: int
    say: Callable[[str], None]
    on: bool = field(init=False)
    _bytes: int = 0
    _writing: float = 0.0
    _computing: float = 0.0
    _seen: int = 0

    def __post_init__(self) -> None:
        self.on = self.more > 0 and self.limit > 0

    def keep(self, index: int, tensors: dict[str, tuple[Tensor, float]]) -> None:
        """Write what one pass computed, as long as that pays."""
        size = sum(tensor.numel() * tensor.element_size() for tensor, _ in tensors.values())
        if not self._seen and (expected := size * (self.passes - index)) > self.limit / 2:
            self._stop(f"{_bytes(expected)} of them would be more than half of --cache-size")
            return
        began = time.monotonic()
        written = self.stream.write(index, tensors)
        self._writing += time.monotonic() - began
        self._bytes += size
        if self._seen:  # the first pass also warms up
            self._computing += sum(seconds for _, seconds in tensors.values())
        self._seen += 1
        if not written:
            self._stop("they could not be written")
        elif (index + 1) % CHUNK == 0 and self._seen <= 2 * CHUNK:
            self._decide(index, list(tensors))

    def _decide(self, index: int, names: list[str]) -> None:
        began = time.monotonic()
        found = self.stream.read(index, names)
        if found is None:
            return
        reading = time.monotonic() - began
        computing = self._computing / max(1, self._seen - 1)
        writing = self._writing / self._seen
        costs = f"computing {computing:.3f} s a pass, reading {reading:.3f} s, writing {writing:.3f} s"
        if self.more * (computing - reading) <= writing:
            self._stop(costs)
        elif self._seen <= CHUNK:
            size = _bytes(self._bytes / self._seen * self.passes)
            self.say(f"keeping what the untouched stages make of the training images for other runs: {size}; {costs}")

    def _stop(self, reason: str) -> None:
        self.on = False
        self.say(f"not keeping what the untouched stages make of the training images: {reason}")


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{math.ceil(number / 1e6)} MB"
