"""BitFit: only the bias terms are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import method
from harness.method import hyperparameter
from methods.selection import Selection

if TYPE_CHECKING:
    from torch import nn

    from harness.models.backbones.backbone import StagedBackbone

_NAMES = ("bias", "q_bias", "k_bias", "v_bias")


class Bias(Selection):
    """Un-freezes every bias vector that came with the backbone: of linear layers, convolutions and norms.

    Attention's separate query and value biases (Swin v2, EVA) are among them. Tables of relative positions are not
    bias terms in BitFit's sense and stay frozen; VPT's code, which takes every name that contains "bias", trains a
    Swin's as well. No bias is added to a layer without one, as TinyTL (arXiv 2007.11622) would.
    """

    name = "bias"
    summary = "only the bias terms are trained"
    source = "Ben Zaken et al., BitFit, arXiv 2106.10199; for vision as Bias in arXiv 2203.12119"
    nothing_selected = "the network has no bias terms"

    class Hyperparameters(method.Hyperparameters):
        lr: float = hyperparameter(1e-3, "learning rate of the biases (AdamW)", gt=0, le=10, search=(1e-4, 1e-2, "log"))

    def selected(self, backbone: StagedBackbone) -> list[nn.Parameter]:
        return [p for name, p in backbone.named_parameters() if name.rpartition(".")[2] in _NAMES]
