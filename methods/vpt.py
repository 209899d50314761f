"""VPT, Visual Prompt Tuning: learned tokens before the patches of a ViT, or learned pixels around any image.

This file declares and attaches; the modules are in `methods/modules/vpt.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from harness import method
from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.backbone import StagedBackbone

SOURCE = "Jia et al., Visual Prompt Tuning, arXiv 2203.12119; code github.com/KMnP/vpt"


class _Tokens(Method):
    """What shallow and deep prompts share. Initialisation, place (after the class token) and dropout are the code's.

    VPT's classification head reads the class token; here heads read the patches' maps, which do not contain prompts.
    For Swin the paper gives every window a copy of the prompts, which changes the frozen network's attention; that is
    not implemented.
    """

    source = SOURCE
    changes_start = "prompt tokens take part in the attention from the first step"
    deep: bool

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        if backbone.layout == "NLC" and not backbone.hierarchical:
            return True
        if backbone.layout == "NHWC":
            return Unsupported("windowed attention cannot take prompt tokens without being changed; use vpt_pad")
        return Unsupported("prompt tokens need a network that is one sequence of tokens; use vpt_pad")

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.vpt import PromptTokens

        options = self.hyperparameters
        prompts = PromptTokens(
            depth=self._depth(backbone),
            length=options.length,
            channels=backbone.channels[0],
            patch=backbone.strides[0],
            dropout=options.dropout,
        )
        backbone.insert_prompts(prompts, options.length, self.deep)

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        return self._depth(backbone) * self.hyperparameters.length * backbone.channels[0]

    def _depth(self, backbone: StagedBackbone) -> int:
        return len(backbone.blocks) if self.deep else 1


class VPTShallow(_Tokens):
    """Prompt tokens enter before the first block and stay."""

    name = "vpt_shallow"
    summary = "learned tokens before the first block of a ViT"
    deep = False

    class Hyperparameters(method.Hyperparameters):
        length: int = hyperparameter(
            50, "prompt tokens; the paper picks one of 1, 5, 10, 50, 100, 200 per task", ge=1, le=1024,
            search=[1, 5, 10, 50, 100, 200],
        )  # fmt: skip
        dropout: float = hyperparameter(0.0, "dropout of the prompts", ge=0, lt=1, search=[0.0, 0.1])


class VPTDeep(_Tokens):
    """New prompt tokens before every block, which replace those of the block before."""

    name = "vpt_deep"
    summary = "learned tokens before every block of a ViT"
    deep = True

    class Hyperparameters(method.Hyperparameters):
        length: int = hyperparameter(
            10, "prompt tokens per block; the paper picks one of 1, 5, 10, 50, 100, 200 per task", ge=1, le=1024,
            search=[1, 5, 10, 50, 100, 200],
        )  # fmt: skip
        dropout: float = hyperparameter(0.0, "dropout of the prompts", ge=0, lt=1, search=[0.0, 0.1])


class VPTPad(Method):
    """Learned pixels around the image, before the stem; the only form of VPT for convolutional networks.

    As in the code: the image grows by the border (it does not overwrite the image's own pixels), the colours start
    uniform in 0..1 and are normalised as the image is, and the default width is the code's `NUM_TOKENS`. Ours, since
    dense prediction keeps the maps in place and meets images of any size, where the code has one crop and pools:
    the maps are cut back to the image; the border is filled with the mean colour up to whole cells of the coarsest
    map; and the pixels are kept for one side (the code's crop of 224) and resampled along the borders of others.

    `pixels=fixed` is a control: the same margin with the same first draw of pixels, of which nothing is trained. What
    `learned` gains over it comes from training the pixels; what `fixed` gains over `linear`, from the larger canvas.
    """

    name = "vpt_pad"
    summary = "learned pixels around the image"
    source = SOURCE
    changes_start = "the border takes the place of the zeros that convolutions pad with, and is attended to"

    class Hyperparameters(method.Hyperparameters):
        width: int = hyperparameter(5, "learned pixels on each side of the image", ge=1, le=128, search=(1, 32, "log"))
        side: int = hyperparameter(224, "side of the image for which the pixels are stored", ge=16, le=2048)
        pixels: Literal["learned", "fixed"] = hyperparameter(
            "learned", "train the pixels, or leave them as drawn: a control for the larger canvas"
        )

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.vpt import Border, Surround

        options = self.hyperparameters
        learned = options.pixels == "learned"
        border = Border(options.width, options.side, backbone.strides, backbone.mean, backbone.std, learned)
        backbone.insert_at_output(border)
        backbone.register_forward_pre_hook(Surround(border))

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        """Top and bottom with the corners, then left and right, in three colours; none of them if they are fixed."""
        width, side = self.hyperparameters.width, self.hyperparameters.side
        if self.hyperparameters.pixels == "fixed":
            return 0
        return 3 * 2 * width * (side + 2 * width) + 3 * side * 2 * width
