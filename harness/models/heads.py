"""Decode heads from mmsegmentation: they turn the stages' maps into class logits, the same way for every method.

`fpn`, or `fpn:64` for another width than the default: the width is the number of channels inside the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.util.quiet import quiet_imports
from harness.util.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from harness.models.backbones.backbone import StagedBackbone

HeadFactory = Callable[["StagedBackbone", int, "int | None"], "nn.Module"]
heads: Registry[HeadFactory] = Registry("head")


def parse_head(head: str) -> tuple[str, int | None]:
    """`name` or `name:width` -> (name, width). Raises `UserError` for an unknown name or an invalid width."""
    name, colon, width = head.partition(":")
    heads.get(name)
    if not colon:
        return name, None
    if not width.isdecimal() or len(width) > 4 or not 1 <= int(width) <= 8192:
        hint = f"use a number of channels, such as {name}:128"
        raise UserError(f"invalid width {width!r}", field="head", value=head, hint=hint)
    return name, int(width)


def build_head(head: str, backbone: StagedBackbone, num_classes: int, seed: int) -> nn.Module:
    """The head for a backbone: list of maps [B, C_i, H'/s_i, W'/s_i] -> logits [B, classes, h, w] at a size of its own.
    Both cover the canvas H'×W' exactly.

    Its initialisation depends only on the seed and the shapes, not on the method.
    Raises `UserError` where the head does not fit the backbone.
    """
    import torch

    name, width = parse_head(head)
    with torch.random.fork_rng(devices=[]), quiet_imports():
        torch.manual_seed(seed)
        module = _repeatable(heads.get(name)(backbone, num_classes, width))
        for part in module.modules():
            if callable(getattr(part, "init_weights", None)) and not getattr(part, "_is_init", False):
                part.init_weights()
    return module


def build_auxiliary_head(backbone: StagedBackbone, num_classes: int, seed: int) -> nn.Module:
    """mmsegmentation's FCN head on the third stage, as its configs of PSPNet, UPerNet and others have it: arguments and
    result as for `build_head`."""
    import torch
    from mmseg.models.decode_heads import FCNHead

    stage = min(2, len(backbone.channels) - 1)
    with torch.random.fork_rng(devices=[]), quiet_imports():
        torch.manual_seed(seed)
        head = FCNHead(
            in_channels=backbone.channels[stage],
            in_index=stage,
            channels=256,
            num_convs=1,
            concat_input=False,
            norm_cfg=_norm(),
            **_decoder(num_classes),
        )
        head.init_weights()
    return _on_output(backbone, stage, head)


def _repeatable(module: nn.Module) -> nn.Module:
    """Give mmsegmentation's resizing and pooling gradients that repeat on a GPU: see `resampling`."""
    from mmseg.models.utils import wrappers
    from torch import nn

    from harness.models.resampling import AveragePool, resample_in

    resample_in(wrappers)
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(part, name, AveragePool(child.output_size))
    return module


def _norm() -> dict[str, object]:
    return {"type": "BN", "requires_grad": True}


def _decoder(num_classes: int) -> dict[str, object]:
    """The arguments that all of mmsegmentation's heads share. Their loss is not used: see `network.py`."""
    return {"num_classes": num_classes, "out_channels": num_classes, "align_corners": False}


def _on_output(backbone: StagedBackbone, stage: int, decoder: nn.Module) -> nn.Module:
    """A decoder that reads one map."""
    from torch import nn

    from harness.models.head_inputs import OutputNorms

    if not backbone.trains_output_norms:
        return decoder
    return nn.Sequential(OutputNorms(backbone.channels, [stage]), decoder)


def _on_pyramid(backbone: StagedBackbone, *decoder: nn.Module) -> nn.Module:
    """A decoder that reads all maps of a pyramid. Four maps of one resolution (ViT) are resized to 4, 2, 1 and 1/2 of
    it, as mmsegmentation does for BEiT and MAE."""
    from mmseg.models.necks import Feature2Pyramid
    from torch import nn

    from harness.models.head_inputs import OnEvenGrid, OutputNorms

    if not backbone.hierarchical:
        pyramid = Feature2Pyramid(backbone.channels[0], rescales=[4, 2, 1, 0.5], norm_cfg=_norm())
        return OnEvenGrid(pyramid, *decoder)
    if backbone.trains_output_norms:
        return nn.Sequential(OutputNorms(backbone.channels, range(len(backbone.channels))), *decoder)
    return nn.Sequential(*decoder)


@heads.register("linear")
def _linear(backbone: StagedBackbone, num_classes: int, width: int | None) -> nn.Module:
    """A 1×1 convolution on the last stage's map."""
    if width is not None:
        raise UserError("takes no width, it is one convolution", field="head", value=f"linear:{width}")
    from mmseg.models.decode_heads import FCNHead

    decoder = FCNHead(
        in_channels=backbone.channels[-1],
        in_index=len(backbone.channels) - 1,
        channels=backbone.channels[-1],
        num_convs=0,
        concat_input=False,
        dropout_ratio=0,
        **_decoder(num_classes),
    )
    return _on_output(backbone, len(backbone.channels) - 1, decoder)


@heads.register("fcn")
def _fcn(backbone: StagedBackbone, num_classes: int, width: int | None) -> nn.Module:
    """Two 3×3 convolutions on the last map, their input concatenated: Long et al., arXiv 1411.4038."""
    from mmseg.models.decode_heads import FCNHead

    decoder = FCNHead(
        in_channels=backbone.channels[-1],
        in_index=len(backbone.channels) - 1,
        channels=width or 512,
        num_convs=2,
        concat_input=True,
        norm_cfg=_norm(),
        **_decoder(num_classes),
    )
    return _on_output(backbone, len(backbone.channels) - 1, decoder)


@heads.register("fpn")
def _fpn(backbone: StagedBackbone, num_classes: int, width: int | None) -> nn.Module:
    """Semantic FPN: Kirillov et al., arXiv 1901.02446. The width is the pyramid's; the head inside has half of it."""
    from mmseg.models.decode_heads import FPNHead
    from mmseg.models.necks import FPN

    width = width or 256
    levels = len(backbone.channels)
    return _on_pyramid(
        backbone,
        FPN(in_channels=list(backbone.channels), out_channels=width, num_outs=levels),
        FPNHead(
            in_channels=[width] * levels,
            in_index=list(range(levels)),
            feature_strides=[4 * 2**i for i in range(levels)],
            channels=max(1, width // 2),
            norm_cfg=_norm(),
            **_decoder(num_classes),
        ),
    )


@heads.register("uper")
def _uper(backbone: StagedBackbone, num_classes: int, width: int | None) -> nn.Module:
    """UPerNet: Xiao et al., arXiv 1807.10221."""
    from mmseg.models.decode_heads import UPerHead

    return _on_pyramid(
        backbone,
        UPerHead(
            in_channels=list(backbone.channels),
            in_index=list(range(len(backbone.channels))),
            pool_scales=(1, 2, 3, 6),
            channels=width or 512,
            norm_cfg=_norm(),
            **_decoder(num_classes),
        ),
    )


@heads.register("setr_pup")
def _setr_pup(backbone: StagedBackbone, num_classes: int, width: int | None) -> nn.Module:
    """SETR's progressive up-sampling: Zheng et al., arXiv 2012.15840. For backbones of one resolution."""
    if backbone.hierarchical:
        strides = ", ".join(map(str, backbone.strides))
        problem = f"is for a ViT of one resolution; {backbone.name} has strides {strides}"
        raise UserError(problem, field="head", value="setr_pup", hint="use fpn or uper")
    from mmseg.models.decode_heads import SETRUPHead

    return SETRUPHead(
        in_channels=backbone.channels[-1],
        in_index=len(backbone.channels) - 1,
        channels=width or 256,
        num_convs=4,
        up_scale=2,
        kernel_size=3,
        dropout_ratio=0,
        norm_cfg=_norm(),
        **_decoder(num_classes),
    )
