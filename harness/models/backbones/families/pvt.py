"""Pyramid Vision Transformer, version 2."""

from __future__ import annotations

from typing import Any

from harness.models.backbones.family import BranchPath, CutNetwork, Family, TinyNetwork, pre_norm_branches


class PVTv2(Family):
    """PVTv2, whose encoder is built as SegFormer's MiT is: Wang et al., arXiv 2106.13797. Stages end in their norm."""

    modules = {"pvt_v2": TinyNetwork("pvt_v2_b0", {"depths": (1, 1, 1, 1)})}

    def cut(self, network: Any) -> CutNetwork:
        return CutNetwork.described(network.patch_embed, list(network.stages), network.feature_info)

    def branches(self, block: Any) -> list[BranchPath]:
        return pre_norm_branches()
