"""Norm tuning: the affine parts of all normalisation layers are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import method
from harness.method import hyperparameter
from methods.selection import Selection

if TYPE_CHECKING:
    from torch import nn

    from harness.models.backbones.backbone import StagedBackbone


class Norm(Selection):
    """Un-freezes scale and shift of every batch, layer, group and response norm that came with the backbone.

    Running statistics stay as pre-trained: only the affine part is trained, as in LN-Tune (Basu et al.). Frankle et
    al. train batch norms in an otherwise random network and update the statistics; that is not followed.
    """

    name = "norm"
    summary = "scale and shift of all norms are trained; statistics stay"
    source = "LN-Tune of Basu et al., arXiv 2304.01917; Frankle et al., Training BatchNorm and Only, arXiv 2003.00152"
    nothing_selected = "the network has no norms with scale or shift"

    class Hyperparameters(method.Hyperparameters):
        lr: float = hyperparameter(1e-3, "learning rate of the norms (AdamW)", gt=0, le=10, search=(1e-4, 1e-2, "log"))

    def selected(self, backbone: StagedBackbone) -> list[nn.Parameter]:
        return [p for module in backbone.norms().values() for p in module.parameters(recurse=False)]
