"""The adapter of LoRand: a bottleneck whose two projections are sums of low-rank products with a shared kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankAdapter(nn.Module):
    """x [..., C] -> x + scale · GELU(x W_down) W_up, W_down = Σᵢ Pᵢ Kᵢ Qᵢ [C, n], W_up = Σᵢ Rᵢ Kᵢ Sᵢ [n, C].

    `branches` α terms of rank β; the kernels Kᵢ [β, β] serve both projections. Each factor is uniform within ±1 / √n,
    n being its number of columns (Kaiming with a = √5); S is zero.
    """

    def __init__(self, channels: int, width: int, branches: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.down_left = _drawn(branches, channels, rank)
        self.down_right = _drawn(branches, rank, width)
        self.kernel = _drawn(branches, rank, rank)
        self.up_left = _drawn(branches, width, rank)
        self.up_right = nn.Parameter(torch.zeros(branches, rank, channels))

    def forward(self, x: Tensor) -> Tensor:
        down = (self.down_left @ self.kernel @ self.down_right).sum(0)
        up = (self.up_left @ self.kernel @ self.up_right).sum(0)
        return x + self.scale * (F.gelu(x @ down) @ up)


def _drawn(*shape: int) -> nn.Parameter:
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


def low_rank_adapter_parameters(channels: int, width: int, branches: int, rank: int) -> int:
    """The number of a `LowRankAdapter`'s parameters in closed form."""
    return branches * (2 * rank * (channels + width) + rank**2)
