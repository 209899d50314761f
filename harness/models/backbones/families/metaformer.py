"""MetaFormer: blocks of a token mixer (pooling, convolution or attention) and an MLP."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.models.backbones.family import BranchKind, BranchPath, CutNetwork, Family, Layout, TinyNetwork
from harness.models.backbones.family import branch_path as path


class MetaFormer(Family):
    """PoolFormer, ConvFormer, CAFormer: Yu et al., arXiv 2111.11418 and 2210.13452."""

    modules = {"metaformer": TinyNetwork("caformer_s18")}

    def cut(self, network: Any) -> CutNetwork:
        """The final norm is left out and the head trains one for each output, as in ConvNeXt. PoolFormer's own code for
        segmentation has a group norm of one group there, whose statistics are those of the whole map."""
        return CutNetwork.described(network.stem, list(network.stages), network.feature_info, trains_output_norms=True)

    def branches(self, block: Any) -> list[BranchPath]:
        layout: Layout = "NCHW" if isinstance(block.mlp.fc1, nn.Conv2d) else "NLC"
        mixer: BranchKind = "attention" if hasattr(block.token_mixer, "qkv") else "conv"
        return [
            path(mixer, "norm1", "norm1", "layer_scale1", layout),
            path("mlp", "norm2", "norm2", "layer_scale2", layout),
        ]
