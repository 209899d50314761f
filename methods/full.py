"""Full fine-tuning: every tensor of the backbone is trained. The reference for the other methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from harness import method
from harness.method import hyperparameter
from methods.selection import ModuleSelection

if TYPE_CHECKING:
    from torch import nn

    from harness.models.backbones.backbone import StagedBackbone


class Full(ModuleSelection):
    """Un-freezes stem, stages and output norm; the head learns faster than the pre-trained backbone by default."""

    name = "full"
    summary = "all of the backbone is trained"
    source = "the common practice; batch-norm statistics move as in mmsegmentation's default `norm_eval=False`"
    mergeable: ClassVar[bool] = False  # its export is the whole network already

    class Hyperparameters(method.Hyperparameters):
        lr: float = hyperparameter(
            3e-4, "learning rate of the backbone (AdamW)", gt=0, le=10, search=(1e-6, 1e-3, "log")
        )
        freeze_statistics: bool = hyperparameter(False, "keep the running statistics of batch norms as pre-trained")

    def modules(self, backbone: StagedBackbone) -> list[nn.Module]:
        return [backbone.stem, *backbone.stages, backbone.output_norm]
