"""The module of SSF: a scale and a shift of each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaleShift(nn.Module):
    """y = scale·x + shift along one dimension; the identity at the start."""

    def __init__(self, channels: int, dim: int, shift: bool = True):
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.dim] = -1
        y = x * self.scale.to(x.dtype).view(shape)
        return y if self.shift is None else y + self.shift.to(x.dtype).view(shape)

    @torch.no_grad()
    def fold_into(self, layer: nn.Module) -> None:
        """Make `layer` (linear, convolution or norm) compute scale·layer(x) + shift; without a bias it gets one."""
        weight = layer.weight
        weight.mul_(self.scale.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1)))
        if self.shift is None:
            return
        shift = self.shift.detach().to(weight.dtype)
        if layer.bias is None:
            layer.bias = nn.Parameter(shift.clone(), requires_grad=False)
        else:
            layer.bias.mul_(self.scale.to(weight.dtype)).add_(shift)
