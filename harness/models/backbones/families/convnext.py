"""ConvNeXt."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from harness.models.backbones.family import BranchPath, CutNetwork, Family, TinyNetwork, rename


class ConvNeXt(Family):
    """ConvNeXt, v1 and v2: Liu et al., arXiv 2201.03545; Woo et al., 2301.00808."""

    modules = {"convnext": TinyNetwork("test_convnext")}

    def cut(self, network: Any) -> CutNetwork:
        """The final norm belongs to the classifier and is left out, as in timm's own `features_only`. The head trains
        one for each output instead, as mmpretrain's ConvNeXt does for mmsegmentation."""
        return CutNetwork.described(network.stem, list(network.stages), network.feature_info, trains_output_norms=True)

    def from_openmmlab(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return rename(tensors, {r"\.depthwise_conv\.": ".dwconv.", r"\.pointwise_conv([12])\.": r".pwconv\1."})

    def branches(self, block: Any) -> list[BranchPath]:
        return [BranchPath("conv", "", "norm", "drop_path", "NCHW", "NCHW" if block.use_conv_mlp else "NHWC")]
