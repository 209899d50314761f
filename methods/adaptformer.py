"""AdaptFormer: a bottleneck in parallel to the MLP of every block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import method
from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.attach import Branch
    from harness.models.backbones.backbone import StagedBackbone


class AdaptFormer(Method):
    """x + MLP(norm(x)) becomes x + MLP(norm(x)) + s · up(ReLU(down x)): the bottleneck sees x as it is before the norm.

    Follows the released code: width 64, s = 0.1, dropout 0.1, LoRA's initialisation, no norm of its own. In blocks
    whose only branch contains the MLP among other things (ConvNeXt; attention and MLP in one branch) it is added
    to that branch.
    """

    name = "adaptformer"
    summary = "a scaled bottleneck in parallel to the MLP"
    source = (
        "Chen et al., AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition, arXiv 2205.13535; "
        "code followed: github.com/ShoufaChen/AdaptFormer"
    )

    class Hyperparameters(method.Hyperparameters):
        width: int = hyperparameter(64, "channels of the bottleneck", ge=1, le=4096, search=(8, 128, "log"))
        scale: float = hyperparameter(
            0.1, "factor s on what the bottleneck adds", gt=0, le=100, search=(0.01, 10, "log")
        )
        dropout: float = hyperparameter(0.1, "dropout in the bottleneck", ge=0, le=0.9, search=(0.0, 0.2))

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        return True if self._branches(backbone) else Unsupported("its blocks have no MLP to add a bottleneck to")

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.bottleneck import Bottleneck

        options = self.hyperparameters.model_dump(include={"width", "dropout", "scale"})
        for branch in self._branches(backbone):
            bottleneck = Bottleneck(branch.channels, activation="relu", residual=False, **options)
            backbone.add_to_branch(branch, bottleneck)

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        from methods.modules.bottleneck import bottleneck_parameters

        width = self.hyperparameters.width
        return sum(bottleneck_parameters(branch.channels, width) for branch in self._branches(backbone))

    def _branches(self, backbone: StagedBackbone) -> list[Branch]:
        with_mlp = {branch.block for branch in backbone.branches if branch.kind == "mlp"}
        return [branch for branch in backbone.branches if branch.kind == "mlp" or branch.block not in with_mlp]
