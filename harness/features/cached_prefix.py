"""The outputs of frozen stages, read from the feature cache where it has them and computed where not."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from harness.features.keys import names
from harness.features.store import FeatureStream
from harness.models.backbones.backbone import StagedBackbone, StageOutputs

SHARE = 0.25
"""Of what kept features may take on disk, the most that one run's evaluation adds."""


class CachedPrefix:
    """What the untouched stages make of each forward pass's images: read where it is kept, else computed, and kept.

    To be called with the same images in the same order as whoever kept it.
    """

    def __init__(self, backbone: StagedBackbone, stages: int, stream: FeatureStream, limit: int, device: torch.device):
        self._backbone, self._stages, self._stream, self._device = backbone, stages, stream, device
        self._left = int(limit * SHARE)
        self._keeping = self._left > 0
        self.passes = self.reused = 0

    def __call__(self, images: Tensor) -> StageOutputs:
        prefix, known = self._kept((images.shape[-2], images.shape[-1]))
        self.reused += known == self._stages
        fresh: dict[str, tuple[Tensor, float]] = {}
        for stage in range(known, self._stages):
            began = time.monotonic()
            prefix = self._backbone.prefix(images if prefix is None else prefix, stage + 1)
            fresh[f"stage{stage}"] = (prefix.outputs[stage], time.monotonic() - began)
        assert prefix is not None
        if fresh and self._keeping:
            self._left -= sum(tensor.nbytes for tensor, _ in fresh.values())
            self._keeping = self._left > 0 and self._stream.write(self.passes, fresh)
        self.passes += 1
        return prefix

    def finish(self) -> None:
        """All passes are through."""
        if self._keeping:
            self._stream.finish()
        self._stream.close()

    def _kept(self, size: tuple[int, int]) -> tuple[StageOutputs | None, int]:
        for stages in range(self._stages, 0, -1):
            wanted = names(stages)[1:]
            if self._stream.has(self.passes, wanted) and (found := self._stream.read(self.passes, wanted)) is not None:
                return StageOutputs([found[name].tensor.to(self._device) for name in wanted], size), stages
        return None, 0
