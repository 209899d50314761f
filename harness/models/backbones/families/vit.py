"""Vision Transformer and networks with its layout: one resolution, one sequence of tokens."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn

from harness.models.backbones.family import (
    BranchPath,
    CutNetwork,
    Family,
    TinyNetwork,
    post_norm_branches,
    pre_norm_branches,
)
from harness.models.backbones.family import branch_path as path


class VisionTransformer(Family):
    """ViT, DeiT, DeiT-3, CLIP, MAE and DINOv2 layouts: Dosovitskiy et al., arXiv 2010.11929, and successors."""

    modules = {
        "vision_transformer": TinyNetwork("test_vit"),
        "deit": TinyNetwork("deit_tiny_distilled_patch16_224", {"depth": 4}),
    }
    options = {"dynamic_img_size": True}
    layer_roles = {
        "in_proj": "joint_in",
        "out_proj": "joint_out",
        "attn_out_proj": "proj",
        "mlp_out_proj": "fc2",
    }

    def cut(self, network: Any) -> CutNetwork:
        """The blocks in four equal groups. The final norm is applied to each group's output."""
        return cut_in_four(network, TokenStem(network))

    def branches(self, block: Any) -> list[BranchPath]:
        match type(block).__name__:
            case "Block":
                return pre_norm_branches()
            case "ResPostBlock":
                return post_norm_branches()
            case "ParallelScalingBlock" | "DiffParallelScalingBlock":
                return [path("joint", "in_norm", "in_norm", "drop_path", "NLC")]
            case "ParallelThingsBlock":
                return [
                    path("attention", *_paths(f"attns.{i}"), "NLC") for i in range(len(block.attns))
                ] + [path("mlp", *_paths(f"ffns.{i}"), "NLC") for i in range(len(block.ffns))]  # fmt: skip
        return []


def _paths(scope: str) -> tuple[str, str, str]:
    return f"{scope}.norm", f"{scope}.norm", f"{scope}.drop_path"


class TokenStem(nn.Module):
    """Image -> tokens [B, prefix + patches, C], with position embeddings interpolated to the image's grid."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        x = self.network.patch_embed(images)
        return self.network.norm_pre(self.network.patch_drop(self.network._pos_embed(x)))


def cut_in_four(network: nn.Module, stem: nn.Module) -> CutNetwork:
    """Four equal groups of the blocks of a network with one resolution, after `stem`, which holds the network.

    Removes the blocks from the network, and the layers that are only used for classification.
    """
    blocks, norm = network.blocks, network.norm
    network.blocks, network.norm, network.fc_norm, network.head = (nn.Identity() for _ in range(4))
    network.attn_pool = None
    bounds = [round(len(blocks) * k / 4) for k in range(5)]
    return CutNetwork(
        stem,
        [blocks[start:end] for start, end in itertools.pairwise(bounds)],
        channels=[network.embed_dim] * 4,
        strides=[network.patch_embed.patch_size[0]] * 4,
        layout="NLC",
        prefix_tokens=network.num_prefix_tokens,
        output_norm=norm,
    )
