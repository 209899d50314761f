"""Rein: learned low-rank tokens refine the features after every block.

This file declares and attaches; the modules are in `methods/modules/rein.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import method
from harness.method import Method, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.attach import Block
    from harness.models.backbones.backbone import StagedBackbone


class Rein(Method):
    """After block l, f becomes f + scale·MLP(softmax(f T_lᵀ/√C) MLP(T_l) + f), with tokens T_l = A_l B_l of its own
    and the two linear MLPs and the scale shared.

    Follows the released code, `LoRAReins`: the class and register tokens pass unchanged; a ViT shares over all of its
    blocks, a network whose resolution changes over each stage (as in the released ConvNeXt and ResNet forms). Where the
    width changes inside a stage (EfficientNet), blocks of one width share; that is ours.

    Ours is without `link_token_to_query`, which the released Mask2Former configurations switch on: it adds a projection
    of the tokens to that head's queries (0.46 M of the 2.99 M that the paper counts on ViT-L). The heads here have no
    queries, and every method of a table has the same head. It is the code's own form for other heads
    (`link_token_to_query=False`).
    """

    name = "rein"
    summary = "learned low-rank tokens refine the features after every block"
    source = "Wei et al., Stronger, Fewer, & Superior, arXiv 2312.04265; code github.com/w1oves/Rein"
    changes_start = "the scale of the refinement starts at 0.001, as published, and not at zero"

    class Hyperparameters(method.Hyperparameters):
        tokens: int = hyperparameter(100, "m, learned tokens per block", ge=2, le=1024, search=[50, 75, 100, 125, 150])
        rank: int = hyperparameter(
            16, "r, the inner width of a block's tokens", ge=1, le=256, search=[4, 8, 16, 32, 64]
        )
        scale: float = hyperparameter(1e-3, "the scale at the start", gt=0, le=1)

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.rein import Refinement, SharedRefinement

        options = self.hyperparameters
        for (_, channels), blocks in _groups(backbone).items():
            shared = SharedRefinement(channels, options.scale)
            for block in blocks:
                module = Refinement(
                    shared,
                    owner=block is blocks[0],
                    channels=channels,
                    tokens=options.tokens,
                    rank=options.rank,
                    patch=backbone.strides[block.stage],
                )
                backbone.insert_after_block(block, module, view="map")

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        """r(m + C) for each block; two linear layers and a scale for each group of blocks."""
        options = self.hyperparameters
        return sum(
            len(blocks) * options.rank * (options.tokens + channels) + 2 * (channels + 1) * channels + 1
            for (_, channels), blocks in _groups(backbone).items()
        )


def _groups(backbone: StagedBackbone) -> dict[tuple[int, int], list[Block]]:
    """(stage, width) -> the blocks that share; a ViT counts as one stage."""
    groups: dict[tuple[int, int], list[Block]] = {}
    for block in backbone.blocks:
        groups.setdefault((block.stage if backbone.hierarchical else 0, block.channels), []).append(block)
    return groups
