"""EVA and the other Vision Transformers with rotary position embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.backbones.families.vit import cut_in_four
from harness.models.backbones.family import (
    BranchPath,
    CutNetwork,
    Family,
    TinyNetwork,
    call_fused_projections,
    post_norm_branches,
    pre_norm_branches,
)


class Eva(Family):
    """EVA, EVA-02 and others of timm's class: DINOv3, ViTs with rotary embeddings, Perception Encoder, Sapiens.

    Fang et al., arXiv 2211.07636 and 2303.11331; Siméoni et al., 2508.10104. Cut as a ViT.
    """

    modules = {"eva": TinyNetwork("eva02_tiny_patch14_224", {"depth": 4})}
    options = {"dynamic_img_size": True}
    layer_roles = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}

    def cut(self, network: Any) -> CutNetwork:
        call_fused_projections(network)
        rotary = Rotary()
        cut = cut_in_four(network, RotaryStem(network, rotary))
        stages, first = [], 0
        for group in cut.stages:
            stages.append(RotaryStage(group, rotary, first, network.rope_mixed))
            first += len(group)
        return replace(cut, stages=stages)

    def branches(self, block: Any) -> list[BranchPath]:
        return post_norm_branches() if type(block).__name__ == "EvaBlockPostNorm" else pre_norm_branches()


class Rotary:
    """Rotary position embeddings of the current image's grid: the stem writes, the blocks read. Never copied."""

    embedding: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Rotary, ()


class RotaryStem(nn.Module):
    """As `TokenStem`, and computes the rotary embeddings once for all blocks."""

    def __init__(self, network: nn.Module, rotary: Rotary):
        super().__init__()
        self.network = network
        self.rotary = rotary

    def forward(self, images: Tensor) -> Tensor:
        x, self.rotary.embedding = self.network._pos_embed(self.network.patch_embed(images))
        return self.network.norm_pre(x)

    def prepare(self, size: tuple[int, int]) -> None:
        """Compute the embeddings that the stem provides, for a forward pass that starts after a stage; `size`: (H', W')
        of the canvas."""
        weight = next(self.network.patch_embed.parameters())
        with torch.no_grad():
            self(weight.new_zeros(1, 3, *size))


class RotaryStage(nn.Module):
    """A group of blocks that read the rotary embeddings."""

    def __init__(self, blocks: nn.Module, rotary: Rotary, first: int, by_depth: bool):
        """`by_depth`: there is one embedding per block; `first` is the depth of the stage's first block."""
        super().__init__()
        self.blocks = blocks
        self.rotary = rotary
        self.first = first
        self.by_depth = by_depth

    def forward(self, x: Tensor) -> Tensor:
        embedding = self.rotary.embedding
        for depth, block in enumerate(self.blocks, self.first):
            x = block(x, rope=embedding[depth] if self.by_depth and embedding is not None else embedding)
        return x
