"""Conv-Adapter: depth-wise, then point-wise, in parallel to a part of a convolutional block; and where that part is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Conv2dSame
from timm.models._efficientnet_blocks import ConvBnAct, EdgeResidual, InvertedResidual, UniversalInvertedResidual
from timm.models.convnext import ConvNeXtBlock
from timm.models.metaformer import MetaFormerBlock
from timm.models.res2net import Bottle2neck
from torch import Tensor, nn

from methods.modules.bottleneck import ACTIVATIONS

if TYPE_CHECKING:
    from harness.models.backbones.backbone import StagedBackbone

WHOLE_BLOCKS = (ConvBnAct, EdgeResidual, InvertedResidual, UniversalInvertedResidual)


@dataclass(frozen=True)
class Place:
    """What one adapter is parallel to: the layers from `first` to `last`, by name."""

    first: str
    last: str
    inputs: int
    """Channels that enter `first`."""
    outputs: int
    """Channels that leave `last`."""
    window: nn.Conv2d
    """Its kernel, stride, padding and dilation are the adapter's."""

    def parameters(self, compression: int) -> int:
        """The number of a `ConvAdapterModule`'s parameters in closed form."""
        width, groups = narrowed(self.inputs, compression)
        depth = width * (self.inputs // groups * math.prod(self.window.kernel_size) + 1)
        return depth + (width + 2) * self.outputs


class ConvAdapterModule(nn.Module):
    """x [B, C, h, w] -> scale ⊙ point(act(depth x)), of the size of what leaves the place.

    `depth` narrows C to C/γ channels; each of them sees γ channels. `point` widens to the place's output channels and
    starts at zero; the scale, one per channel, starts at one.
    """

    def __init__(self, place: Place, compression: int, activation: str):
        super().__init__()
        width, groups = narrowed(place.inputs, compression)
        kind = Conv2dSame if isinstance(place.window, Conv2dSame) else nn.Conv2d
        window = (place.window.kernel_size, place.window.stride, place.window.padding, place.window.dilation)
        self.depth = kind(place.inputs, width, *window, groups)
        self.act = ACTIVATIONS[activation]()
        self.point = nn.Conv2d(width, place.outputs, 1)
        self.scale = nn.Parameter(torch.ones(place.outputs, 1, 1))
        nn.init.zeros_(self.point.weight)
        nn.init.zeros_(self.point.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.point(self.act(self.depth(x)))


def narrowed(channels: int, compression: int) -> tuple[int, int]:
    """Width of the adapter and groups of its depth-wise part; as many groups as divide both numbers of channels."""
    width = max(1, channels // compression)
    return width, math.gcd(channels, width)


def find_places(backbone: StagedBackbone) -> list[Place]:
    """The places of all adapters, those of blocks first; none where no block has a convolution for one."""
    names = {module: name for name, module in backbone.named_modules()}
    places = [
        Place(f"{names[block.module]}.{first}".rstrip("."), f"{names[block.module]}.{last}".rstrip("."), *geometry)
        for block in backbone.blocks
        for first, last, *geometry in _in_block(block.module, block.channels)
    ]
    return [*places, *_between_stages(backbone)] if places else []


def _in_block(block: Any, channels: int) -> Iterator[tuple[str, str, int, int, nn.Conv2d]]:
    """The fields of `Place`, with names inside the block; an empty name is the block itself."""
    wide = [layer for layer in _convolutions(block) if max(layer.kernel_size) > 1]
    if not wide:
        return
    if isinstance(block, WHOLE_BLOCKS):
        yield "", "", _first_inputs(block), channels, next((c for c in wide if max(c.stride) > 1), wide[-1])
    elif isinstance(block, ConvNeXtBlock):
        yield "conv_dw", "conv_dw", channels, channels, block.conv_dw
    elif isinstance(block, MetaFormerBlock):
        yield "token_mixer", "token_mixer", channels, channels, wide[0]
    elif isinstance(block, Bottle2neck):
        for index, layer in enumerate(block.convs):
            yield f"convs.{index}", f"convs.{index}", layer.in_channels, layer.out_channels, layer
    elif hasattr(block, "conv3"):  # a bottleneck; the last is the activation behind its K×K convolution
        last = next(name for name in ("act2", "norm3", "conv2") if hasattr(block, name))
        width = _first_inputs(block.conv3)
        yield "conv2", last, width, width, _convolutions(block.conv2)[0]
    elif hasattr(block, "conv2"):  # a basic block
        yield "conv1", "conv1", block.conv1.in_channels, _first_inputs(block.conv2), _convolutions(block.conv1)[0]


def _between_stages(backbone: StagedBackbone) -> Iterator[Place]:
    for name in backbone.layers("merge"):
        layer = backbone.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            yield Place(name, name, layer.in_channels, layer.out_channels, layer)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """The convolutions in order of registration, without those of attention, MLP and shortcut."""
    named = [(set(name.split(".")), layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]
    return [layer for path, layer in named if not path & {"attn", "mlp", "downsample"}]


def _first_inputs(module: nn.Module) -> int:
    """Channels that enter the first convolution, which may be split into several (MixNet)."""
    return next(int(layer.in_channels) for layer in module.modules() if hasattr(layer, "in_channels"))
