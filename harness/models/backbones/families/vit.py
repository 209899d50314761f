"""Vision Transformer and networks with its layout: one resolution, one sequence of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from harness.models.backbones.family import (
    BranchPath,
    CutNetwork,
    Family,
    TinyNetwork,
    post_norm_branches,
    pre_norm_branches,
    rename,
    timm_module,
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

    def from_published(self, tensors: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
        """With the options that timm's builders give to the filter: layer scales of DeiT-3, resampling of FlexiViT."""
        architecture = network.pretrained_cfg["architecture"]
        if "radio" in architecture:  # its position table is resampled in a way that only its builder knows
            return tensors
        options: dict[str, Any] = {"adapt_layer_scale": True}
        if "flexi" in architecture:
            options |= {"interpolation": "bilinear", "antialias": False}
        return timm_module(network).checkpoint_filter_fn(tensors, network, **options)

    def from_openmmlab(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """mmsegmentation's patch embedding has no bias by default, which is a bias of zeros."""
        renamed = rename(tensors, _OPENMMLAB)
        weight = tensors.get("patch_embed.projection.weight")
        if weight is not None and "patch_embed.projection.bias" not in tensors:
            renamed["patch_embed.proj.bias"] = weight.new_zeros(len(weight))
        return renamed

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


_OPENMMLAB: Mapping[str, str] = {
    r"^layers\.": "blocks.",
    r"^patch_embed\.projection\.": "patch_embed.proj.",
    r"^pre_norm\.": "norm_pre.",
    r"^(ln|norm)1\.": "norm.",
    r"\.ln([12])\.": r".norm\1.",
    r"\.attn\.attn\.in_proj_": ".attn.qkv.",
    r"\.attn\.attn\.out_proj\.": ".attn.proj.",
    r"\.attn\.gamma1\.weight$": ".ls1.gamma",
    r"\.ffn\.gamma2\.weight$": ".ls2.gamma",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.",
}


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
