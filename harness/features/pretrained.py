"""The frozen backbone before a method is attached: networks are built on it and compared with it."""

from __future__ import annotations

import copy

import torch

from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.weights import tensors_digest


class PretrainedBackbone:
    """A frozen backbone with its weights, loaded once; every network and the timing at the end use a copy."""

    def __init__(self, backbone: StagedBackbone):
        """`backbone` must not be changed afterwards."""
        self._backbone = backbone
        self.notes = backbone.notes
        self.sha256 = tensors_digest(backbone)
        self.inference_seconds: dict[str, tuple[float, float]] = {}
        """Inference times of networks built on it, by a digest of their arithmetic: (adapted, frozen backbone)."""
        self._probe = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        self._outputs = backbone.prefix(self._probe, len(backbone.stages)).outputs

    def copy(self) -> StagedBackbone:
        return copy.deepcopy(self._backbone)

    def count_frozen_stages(self, backbone: StagedBackbone) -> int:
        """Number of first stages that a method left frozen and that still compute what they did before it."""
        stages = backbone.count_frozen_stages()
        if not stages:
            return 0
        now = backbone.prefix(self._probe, stages).outputs
        same = [torch.equal(one, other) for one, other in zip(now, self._outputs, strict=False)]
        return [*same, False].index(False)
