"""Full fine-tuning: every tensor of the backbone is trained. The reference that the others are weighed against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import method
from harness.method import Method, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.backbone import StagedBackbone


class Full(Method):
    """Un-freezes stem, stages and output norm; the head learns faster than the pre-trained backbone by default."""

    name = "full"
    summary = "all of the backbone is trained"
    source = "the common practice; batch-norm statistics move as in mmsegmentation's default `norm_eval=False`"

    class Hyperparameters(method.Hyperparameters):
        lr: float = hyperparameter(
            3e-4, "learning rate of the backbone (AdamW)", gt=0, le=10, search=(1e-6, 1e-3, "log")
        )
        head_lr_scale: float = hyperparameter(3.0, "the head's learning rate, as a multiple of lr", gt=0, le=1000)
        freeze_statistics: bool = hyperparameter(False, "keep the running statistics of batch norms as pre-trained")

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        if self.hyperparameters.freeze_statistics:
            backbone.unfreeze(*backbone.parameters())
        else:
            backbone.unfreeze(backbone.stem, *backbone.stages, backbone.output_norm)

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        return sum(parameter.numel() for parameter in backbone.parameters())
