"""The bottleneck of adapters: down to a narrow width, a non-linearity, up again; it adds zero at the start."""

from __future__ import annotations

import math

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class Bottleneck(nn.Module):
    """x [..., C] -> scale · up(dropout(act(down x))), plus x where `residual`.

    `down` is drawn as LoRA's first factor is, `up` and both biases are zero: the initialisation of AdaptFormer's code.
    """

    def __init__(self, channels: int, width: int, activation: str, dropout: float, scale: float, residual: bool):
        super().__init__()
        self.scale = scale
        self.residual = residual
        self.down = nn.Linear(channels, width)
        self.act = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(width, channels)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        change = self.scale * self.up(self.dropout(self.act(self.down(x))))
        return x + change if self.residual else change


def bottleneck_parameters(channels: int, width: int) -> int:
    """The number of a `Bottleneck`'s parameters in closed form."""
    return 2 * channels * width + width + channels
