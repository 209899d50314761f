"""MetaFormer: blocks of a token mixer (pooling, convolution or attention) and an MLP."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.models.backbones.family import BranchPath, CutNetwork, Family, Kind, Layout, PadToMultiple, TinyNetwork
from harness.models.backbones.family import branch_path as path


class MetaFormer(Family):
    """PoolFormer, ConvFormer, CAFormer: Yu et al., arXiv 2111.11418 and 2210.13452."""

    modules = {"metaformer": TinyNetwork("caformer_s18")}

    def cut(self, network: Any) -> CutNetwork:
        """The border is padded and the final norm left out, as in ConvNeXt."""
        stem = nn.Sequential(PadToMultiple(4), network.stem)
        return CutNetwork.described(stem, list(network.stages), network.feature_info)

    def branches(self, block: Any) -> list[BranchPath]:
        layout: Layout = "NCHW" if isinstance(block.mlp.fc1, nn.Conv2d) else "NLC"
        mixer: Kind = "attention" if hasattr(block.token_mixer, "qkv") else "conv"
        return [
            path(mixer, "norm1", "norm1", "layer_scale1", layout),
            path("mlp", "norm2", "norm2", "layer_scale2", layout),
        ]
