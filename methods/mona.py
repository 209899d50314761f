"""Mona: adapters with convolutional filters on the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import method
from harness.method import Method, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.attach import Block, Branch
    from harness.models.backbones.backbone import StagedBackbone


class Mona(Method):
    """After every residual addition, of attention and of the MLP, the stream x becomes x + change(x).

    Follows the released code: width 64, a LayerNorm scaled by 1e-6 beside a scaled identity, depth-wise 3×3, 5×5 and
    7×7 filters, a 1×1, GELU, dropout 0.1. That code is for Swin and draws the upper projection; here it starts at
    zero, so that training starts at the frozen network. A prefix token of a ViT is a map of one pixel to the filters.
    Ours: where blocks have no branches (ResNet, MobileNet, RegNet) one Mona follows each block.
    """

    name = "mona"
    summary = "convolutional adapters with a scaled norm after attention and MLP"
    source = (
        "Yin et al., 5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks, "
        "arXiv 2408.08345 (first 2311.15010); code followed: github.com/Leiyi-Hu/mona"
    )

    class Hyperparameters(method.Hyperparameters):
        width: int = hyperparameter(64, "channels of the filters", ge=1, le=4096, search=(8, 128, "log"))
        dropout: float = hyperparameter(0.1, "dropout before the upper projection", ge=0, le=0.9, search=(0.0, 0.2))

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.mona import MonaChange

        options = self.hyperparameters.model_dump(include={"width", "dropout"})
        last = {branch.block: branch for branch in backbone.branches}
        for branch in backbone.branches:
            if branch is not last[branch.block]:
                change = MonaChange(branch.channels, grid=backbone.patch_grid(branch), **options)
                backbone.add_to_stream(branch, change)
        for block in backbone.blocks:
            backbone.add_to_stream(block, MonaChange(block.channels, grid=backbone.patch_grid(block), **options))

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        from methods.modules.mona import mona_parameters

        places: list[Branch | Block] = [*backbone.branches, *backbone.unbranched_blocks]
        return sum(mona_parameters(place.channels, self.hyperparameters.width) for place in places)
