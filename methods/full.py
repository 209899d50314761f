"""Full fine-tuning: every tensor of the backbone is trained. The reference for the other methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from harness import method
from harness.method import hyperparameter
from methods.selection import ModuleSelection, statistics

if TYPE_CHECKING:
    from torch import nn

    from harness.models.backbones.backbone import StagedBackbone


class Full(ModuleSelection):
    """Un-freezes stem, stages and output norm."""

    name = "full"
    summary = "all of the backbone is trained"
    source = "the common practice; batch-norm statistics are trained as in mmsegmentation's default `norm_eval=False`"
    mergeable: ClassVar[bool] = False  # its export is the whole network already

    class Hyperparameters(method.Hyperparameters):
        lr: float = hyperparameter(
            3e-4, "learning rate of the backbone (AdamW)", gt=0, le=10, search=(1e-6, 1e-3, "log")
        )
        statistics: Literal["train", "frozen"] = statistics()

    def modules(self, backbone: StagedBackbone) -> list[nn.Module]:
        return [backbone.stem, *backbone.stages, backbone.output_norm]
