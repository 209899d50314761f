"""Linear probing: the backbone stays frozen and only the head is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.method import HeadHyperparameters, Method

if TYPE_CHECKING:
    from harness.models.backbones.backbone import StagedBackbone


class Linear(Method):
    """Nothing is added and nothing is un-frozen. Its score shows what the frozen maps contain for this head."""

    name = "linear"
    summary = "only the head is trained; the backbone is frozen"
    source = "Alain & Bengio, Understanding intermediate layers using linear classifier probes, arXiv 1610.01644"
    head_only = True
    Hyperparameters = HeadHyperparameters

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        pass

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        return 0
