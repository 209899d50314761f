"""Convpass: convolutional bypasses in parallel to attention and MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from harness import method
from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.attach import Branch
    from harness.models.backbones.backbone import StagedBackbone


class Convpass(Method):
    """x + f(norm(x)) becomes x + f(norm(x)) + s · bypass(norm(x)), the bypass being 1×1, 3×3, 1×1 convolutions.

    Follows the released code: width 8, QuickGELU around the 3×3 convolution, which starts as the identity; a class
    token is a map of one pixel to the convolution (here: every prefix token is). s is tuned per dataset there.
    Where there is no norm at the entry (Swin V2) the bypass sees x. A ConvNeXt block has one branch and one bypass,
    which sees what its MLP sees.
    """

    name = "convpass"
    summary = "1×1, 3×3, 1×1 convolutional bypasses in parallel to attention and MLP"
    source = (
        "Jie & Deng, Convolutional Bypasses Are Better Vision Transformer Adapters, arXiv 2207.07039; "
        "code followed: github.com/JieShibo/PETL-ViT, convpass/"
    )

    class Hyperparameters(method.Hyperparameters):
        width: int = hyperparameter(8, "channels of the bypass", ge=1, le=1024, search=(4, 64, "log"))
        scale: float = hyperparameter(1.0, "factor s on what a bypass adds", gt=0, le=1000, search=(0.01, 10, "log"))
        dropout: float = hyperparameter(0.1, "dropout in the bypass", ge=0, le=0.9, search=(0.0, 0.2))
        beside: Literal["both", "attention"] = hyperparameter(
            "both", "which branches carry a bypass; attention is the paper's Convpass-attn"
        )
        xavier: bool = hyperparameter(False, "draw the 3×3 convolution (Xavier), instead of the identity")

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        if not backbone.branches:
            return Unsupported("its blocks have no attention and no MLP to add a bypass to")
        return True if self._branches(backbone) else Unsupported("its blocks have no attention")

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.convpass import ConvolutionalBypass

        options = self.hyperparameters.model_dump(include={"width", "scale", "dropout", "xavier"})
        for branch in self._branches(backbone):
            bypass = ConvolutionalBypass(branch.channels, grid=backbone.patch_grid(branch), **options)
            backbone.add_to_branch(branch, bypass, before_entry=False)

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        from methods.modules.convpass import bypass_parameters

        width = self.hyperparameters.width
        return sum(bypass_parameters(branch.channels, width) for branch in self._branches(backbone))

    def _branches(self, backbone: StagedBackbone) -> list[Branch]:
        if self.hyperparameters.beside == "both":
            return backbone.branches
        return [branch for branch in backbone.branches if branch.kind in ("attention", "joint")]
