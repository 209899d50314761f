"""The bypass of Convpass: 1×1, 3×3, 1×1 convolutions through a few channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.models.backbones.attach import PatchGrid


class ConvolutionalBypass(nn.Module):
    """Tokens [B, ..., C] -> scale · up(dropout(g(conv3×3(g(down x))))), with g(z) = z · sigmoid(1.702 z).

    The 3×3 convolution starts as the identity (or Xavier-uniform), `up` as zero.
    """

    def __init__(self, channels: int, width: int, scale: float, dropout: float, xavier: bool, grid: PatchGrid):
        super().__init__()
        self.scale = scale
        self.grid = grid
        self.down = nn.Linear(channels, width)
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(width, channels)
        nn.init.xavier_uniform_(self.down.weight)
        if xavier:
            nn.init.xavier_uniform_(self.convolution.weight)
        else:
            nn.init.dirac_(self.convolution.weight)
        for zero in (self.down.bias, self.convolution.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        inner = _quick_gelu(self.grid(self.convolution, _quick_gelu(self.down(x))))
        return self.scale * self.up(self.dropout(inner))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def bypass_parameters(channels: int, width: int) -> int:
    """The number of a `ConvolutionalBypass`'s parameters in closed form."""
    return (channels + 1) * width + (9 * width + 1) * width + (width + 1) * channels
