"""ConvNeXt."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from harness.models.backbones.family import BranchPath, CutNetwork, Family, PadToMultiple, TinyNetwork


class ConvNeXt(Family):
    """ConvNeXt, v1 and v2: Liu et al., arXiv 2201.03545; Woo et al., 2301.00808."""

    modules = {"convnext": TinyNetwork("test_convnext")}

    def cut(self, network: Any) -> CutNetwork:
        """timm's strided convolutions drop incomplete patches at a map's border; here the border is padded. The final
        norm belongs to the classifier and is left out, as in timm's own `features_only`."""
        for stage in network.stages:
            if isinstance(stage.downsample, nn.Sequential):
                norm, convolution = stage.downsample
                stage.downsample = nn.Sequential(OrderedDict({"0": norm, "pad": PadToMultiple(2), "1": convolution}))
        stem = nn.Sequential(PadToMultiple(4), network.stem)
        return CutNetwork.described(stem, list(network.stages), network.feature_info)

    def branches(self, block: Any) -> list[BranchPath]:
        return [BranchPath("conv", "", "norm", "drop_path", "NCHW", "NCHW" if block.use_conv_mlp else "NHWC")]
