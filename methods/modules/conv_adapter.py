"""Conv-Adapter: depth-wise, then point-wise, in parallel to a convolution of the backbone."""

from __future__ import annotations

import math

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from methods.modules.bottleneck import ACTIVATIONS


class ConvAdapterModule(nn.Module):
    """x [B, C, h, w] -> scale ⊙ point(act(depth x)), of the size of `convolution`'s output.

    `depth` has the kernel, stride, padding and dilation of `convolution` and narrows C to C/γ channels; each of them
    sees γ channels. `point` widens to its output channels and starts at zero; the scale, one a channel, starts at one.
    """

    def __init__(self, convolution: nn.Conv2d, compression: int, activation: str):
        super().__init__()
        width, groups = narrowed(convolution.in_channels, compression)
        kind = Conv2dSame if isinstance(convolution, Conv2dSame) else nn.Conv2d
        window = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
        self.depth = kind(convolution.in_channels, width, *window, groups)
        self.act = ACTIVATIONS[activation]()
        self.point = nn.Conv2d(width, convolution.out_channels, 1)
        self.scale = nn.Parameter(torch.ones(convolution.out_channels, 1, 1))
        nn.init.zeros_(self.point.weight)
        nn.init.zeros_(self.point.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.point(self.act(self.depth(x)))


def narrowed(channels: int, compression: int) -> tuple[int, int]:
    """Width of the adapter and groups of its depth-wise part; as many groups as divide both numbers of channels."""
    width = max(1, channels // compression)
    return width, math.gcd(channels, width)


def conv_adapter_parameters(convolution: nn.Conv2d, compression: int) -> int:
    """The number of a `ConvAdapterModule`'s parameters in closed form."""
    width, groups = narrowed(convolution.in_channels, compression)
    depth = width * (convolution.in_channels // groups * math.prod(convolution.kernel_size) + 1)
    return depth + (width + 2) * convolution.out_channels
