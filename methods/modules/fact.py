"""The modules of FacT: weight increments of many layers as products of a few shared factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class SharedFactors(nn.Module):
    """U [C, r] and V [r, C], for all layers of one width; Tucker's core and rows for the Tucker form.

    `core_of(first, count)` gives the r×r matrices of the slices `first` .. `first + count`, [count, r, r].
    """

    def __init__(self, channels: int, rank: int, slices: int, tucker: bool):
        super().__init__()
        self.u = nn.Parameter(torch.empty(channels, rank).uniform_(-1, 1) / math.sqrt(channels))
        self.v = nn.Parameter(torch.zeros(rank, channels))
        if tucker:
            self.core = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, rank, rank)))
            self.rows = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, slices)))

    def core_of(self, first: int, count: int) -> Tensor:
        return torch.einsum("ijk,kn->nij", self.core, self.rows[:, first : first + count])


class Increment(nn.Module):
    """x [..., a·C] -> the increment [..., b·C] of a layer whose weight is cut into a·b squares of C.

    Every C of the input goes through U, all of them through the middle [a·r, b·r], every r of that through V.
    """

    def __init__(
        self,
        shared: SharedFactors,
        owner: bool,
        inputs: int,
        outputs: int,
        first: int,
        tucker: bool,
        scale: float,
        dropout: float,
    ):
        """`inputs` a, `outputs` b. One of the modules that share factors is their `owner` and registers them; the
        others refer to them, so that each tensor has one name. `first`: index of the first slice, for Tucker."""
        super().__init__()
        rank = shared.u.shape[1]
        self._shared = (shared,)
        if owner:
            self.shared = shared
        self.inputs = inputs
        self.outputs = outputs
        self.first = first
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.middle: nn.Parameter | None = None
        if not tucker:
            drawn = torch.empty(inputs * rank, outputs * rank).uniform_(-1, 1)
            self.middle = nn.Parameter(drawn / math.sqrt(inputs * rank))

    def forward(self, x: Tensor) -> Tensor:
        (shared,) = self._shared
        low = (x.unflatten(-1, (self.inputs, -1)) @ shared.u).flatten(-2)
        low = self.dropout(low @ self._middle(shared))
        return self.scale * (low.unflatten(-1, (self.outputs, -1)) @ shared.v).flatten(-2)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """What it adds to the weight of its layer, [b·C, a·C]."""
        (shared,) = self._shared
        size = self.inputs * shared.u.shape[0]
        training, self.dropout.training = self.dropout.training, False
        weight = self(torch.eye(size, dtype=shared.u.dtype, device=shared.u.device)).T
        self.dropout.training = training
        return weight

    @torch.no_grad()
    def fold_into(self, layer: Any) -> None:
        """Add the increment to the layer's weight."""
        layer.weight.add_(self.weight().to(layer.weight.dtype))

    def _middle(self, shared: SharedFactors) -> Tensor:
        if self.middle is not None:
            return self.middle
        slices = shared.core_of(self.first, self.inputs * self.outputs)
        return slices.unflatten(0, (self.inputs, self.outputs)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
