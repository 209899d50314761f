"""LoRand: adapters whose projections are synthesised from low-rank factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import method
from harness.method import Method, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.attach import Block, Branch
    from harness.models.backbones.backbone import StagedBackbone


class LoRand(Method):
    """The adapter of Houlsby et al. after attention and MLP, with W_down and W_up built of few parameters.

    From the paper: α branches of rank β, a kernel shared by the two projections of a branch, and the variants LoRand
    (α = 2, β = 8), LoRand+ (4, 8) and LoRand++ (4, 16). There is no released code. Ours, read off the published count
    for Swin-L (see the tests): an inner width of C/8 and no biases. Also ours: the last factor starts at zero, so that
    training starts at the frozen network, and where blocks have no branches (ResNet, MobileNet, RegNet) one adapter
    follows each block.
    """

    name = "lorand"
    summary = "adapters of low-rank, multi-branch projections"
    source = (
        "Yin et al., 1% vs 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions, CVPR 2023, "
        "pages 20116-20126; no code is public"
    )
    decayed = ("down_left", "down_right", "kernel", "up_left", "up_right")

    class Hyperparameters(method.Hyperparameters):
        branches: int = hyperparameter(2, "low-rank terms per projection, α", ge=1, le=64, search=[2, 4])
        rank: int = hyperparameter(8, "rank of a term, β", ge=1, le=256, search=[4, 8, 16])
        reduction: int = hyperparameter(8, "channels per inner channel", ge=1, le=256)
        scale: float = hyperparameter(1.0, "factor on what an adapter adds", gt=0, le=100, search=(0.1, 10, "log"))

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.lorand import LowRankAdapter

        options = self.hyperparameters.model_dump(include={"branches", "rank", "scale"})
        for branch in backbone.branches:
            backbone.insert_at_exit(branch, LowRankAdapter(branch.channels, self._width(branch.channels), **options))
        for block in backbone.unbranched_blocks:
            backbone.insert_after_block(block, LowRankAdapter(block.channels, self._width(block.channels), **options))

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        from methods.modules.lorand import low_rank_adapter_parameters

        options = self.hyperparameters.model_dump(include={"branches", "rank"})
        places: list[Branch | Block] = [*backbone.branches, *backbone.unbranched_blocks]
        return sum(low_rank_adapter_parameters(p.channels, self._width(p.channels), **options) for p in places)

    def _width(self, channels: int) -> int:
        return max(1, channels // self.hyperparameters.reduction)
