"""The linear adapter of RepAdapter, which is an affine map and so can be folded into the layer behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LinearAdapter(nn.Module):
    """x [..., C] -> x + scale · (B dropout(A x + a) + c), with A dense, C -> width, and B block-diagonal in groups.

    A is Xavier-uniform; a, B and c are zero.
    """

    def __init__(self, channels: int, width: int, groups: int, scale: float, dropout: float):
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(channels, width)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Parameter(torch.zeros(groups, width // groups, channels // groups))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(self.down(x)).unflatten(-1, (self.up.shape[0], -1))
        change = torch.einsum("...gi,gio->...go", inner, self.up).flatten(-2) + self.bias
        return x + self.scale * change

    def affine(self) -> tuple[Tensor, Tensor]:
        """(M, m) in float64, with which the adapter, without dropout, is x -> M x + m."""
        up = torch.block_diag(*self.up.detach().double()).T
        down, inner = self.down.weight.detach().double(), self.down.bias.detach().double()
        identity = torch.eye(up.shape[0], dtype=up.dtype, device=up.device)
        return identity + self.scale * up @ down, self.scale * (up @ inner + self.bias.detach().double())

    @torch.no_grad()
    def fold_into(self, layer: Any) -> None:
        """Make `layer` (linear or convolution) compute layer(adapter(x)), without dropout. It gets a bias if needed.

        Exact for linear layers, and for convolutions without padding.
        """
        matrix, constant = self.affine()
        weight = layer.weight.to(torch.float64)
        if weight.dim() == 2:
            shift = weight @ constant
        else:
            shift = torch.einsum("oi...,i->o...", weight, constant).flatten(1).sum(1)
        layer.weight.copy_(torch.einsum("oc...,ci->oi...", weight, matrix))
        if layer.bias is not None:
            layer.bias.copy_(layer.bias + shift)
        elif bool(shift.any()):
            layer.bias = nn.Parameter(shift.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


def linear_adapter_parameters(channels: int, width: int, groups: int) -> int:
    """The number of a `LinearAdapter`'s parameters in closed form."""
    return (channels + 1) * width + channels * width // groups + channels
