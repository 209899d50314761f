"""The module of Mona: a bottleneck with a scaled norm in front and depth-wise filters of three sizes inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.models.backbones.attach import PatchGrid

KERNELS = (3, 5, 7)


class MultiCognitiveFilter(nn.Module):
    """z [B, D, h, w] -> v + conv1×1(v), with v = z + the mean of three depth-wise convolutions of z."""

    def __init__(self, width: int):
        super().__init__()
        self.depth = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in KERNELS)
        self.point = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + sum(convolution(x) for convolution in self.depth) / len(KERNELS)
        return x + self.point(x)


class MonaChange(nn.Module):
    """What a Mona adds to tokens x [B, ..., C]: up(dropout(GELU(filter(down(γ ⊙ norm(x) + γₓ ⊙ x))))).

    γ starts at 1e-6, γₓ at one, `up` at zero.
    """

    def __init__(self, channels: int, width: int, dropout: float, grid: PatchGrid):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.gamma_x = nn.Parameter(torch.ones(channels))
        self.down = nn.Linear(channels, width)
        self.filter = MultiCognitiveFilter(width)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(width, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(self.gamma * self.norm(x) + self.gamma_x * x)
        return self.up(self.dropout(F.gelu(self.grid(self.filter, inner))))


def mona_parameters(channels: int, width: int) -> int:
    """The number of a `MonaChange`'s parameters in closed form."""
    scaled_norm = 4 * channels
    projections = 2 * channels * width + width + channels
    filters = width * (sum(k * k for k in KERNELS) + len(KERNELS)) + (width + 1) * width
    return scaled_norm + projections + filters
