"""Partial-k: the last k blocks are trained, and everything before them stays frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from harness import method
from harness.method import Unsupported, hyperparameter
from methods.selection import ModuleSelection, statistics

if TYPE_CHECKING:
    from torch import nn

    from harness.models.backbones.backbone import StagedBackbone


class Partial(ModuleSelection):
    """Un-freezes the last k blocks and whatever runs after the first of them: layers between two stages, norms at a
    stage's end, and the output norm.

    This is the rule that VPT's code (github.com/KMnP/vpt, `src/models/vit_models.py`) spells out for k = 1, 2, 4: the
    encoder's norm is trained with the blocks, and so is a Swin's patch merging where it stands between two of them.
    Yosinski et al. (arXiv 1411.1792) cut a CNN the same way. A ViT here applies its output norm to every stage's map,
    so training it changes all four maps, not only the last one.
    """

    name = "partial"
    summary = "the last k blocks are trained"
    source = "Partial-k of Jia et al., Visual Prompt Tuning, arXiv 2203.12119, section 4.1, and its code"

    class Hyperparameters(method.Hyperparameters):
        lr: float = hyperparameter(
            3e-4, "learning rate of the backbone (AdamW)", gt=0, le=10, search=(1e-6, 1e-3, "log")
        )
        blocks: int = hyperparameter(1, "how many blocks, counted from the end", ge=1, le=1000, search=[1, 2, 4])
        statistics: Literal["train", "frozen"] = statistics()

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        blocks, available = self.hyperparameters.blocks, len(backbone.blocks)
        if blocks > available:
            return Unsupported(f"blocks={blocks}, and the network has {available}; the method full trains all of it")
        return True

    def modules(self, backbone: StagedBackbone) -> list[nn.Module]:
        blocks = backbone.blocks
        chosen = blocks[len(blocks) - self.hyperparameters.blocks :]
        first = chosen[0].stage
        modules = [block.module for block in chosen if block.stage == first]
        closing = getattr(backbone.stages[first], "norm", None)  # PVTv2's stages end in a norm
        modules += [closing] if closing is not None else []
        return [*modules, *list(backbone.stages)[first + 1 :], backbone.output_norm]
