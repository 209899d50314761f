"""The frozen backbone before any method: what networks are built on, and what they are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.weights import tensors_digest


class PretrainedBackbone:
    """A frozen backbone with its weights, as a fresh object each time it is asked for."""

    def __init__(self, load: Callable[[], StagedBackbone], keep: bool):
        """`keep` it in memory, for several networks are built on it; else it is loaded again for a second one."""
        self._load, self._keep = load, keep
        self.timed: dict[str, tuple[float, float]] = {}
        """Inference times of what is built on it, by what their arithmetic hangs on."""
        self._kept: StagedBackbone | None = load()
        self.sha256 = tensors_digest(self._kept)
        self._probe = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        self._outputs = self._kept.prefix(self._probe, len(self._kept.stages)).outputs

    def backbone(self) -> StagedBackbone:
        if self._keep:
            return copy.deepcopy(self._kept)
        backbone, self._kept = self._kept or self._load(), None
        return backbone

    def count_frozen_stages(self, backbone: StagedBackbone) -> int:
        """The stages that a method left untouched, as far as they also compute what they did before it."""
        stages = backbone.count_frozen_stages()
        if not stages:
            return 0
        now = backbone.prefix(self._probe, stages).outputs
        same = [torch.equal(one, other) for one, other in zip(now, self._outputs, strict=False)]
        return [*same, False].index(False)
