"""The side network of ladder side-tuning: taps on frozen blocks, gates, light blocks, and the way back to the maps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

GATE_TEMPERATURE = 0.1


class Activations:
    """Detached outputs of blocks during one forward pass; not copied with the network."""

    def __init__(self) -> None:
        self.by_block: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Activations:
        memo[id(self)] = copy = Activations()
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return Activations, ()


class Tap(nn.Module):
    """The identity on maps [B, C, h, w]; keeps a detached copy of them."""

    def __init__(self, block: int, activations: Activations):
        super().__init__()
        self.block = block
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        self.activations.by_block[self.block] = x.detach()
        return x


class Rung(nn.Module):
    """s, h -> block(μ s + (1 − μ) down(h)); the first rung has no s and no gate."""

    def __init__(self, channels: int, width: int, expansion: int, first: bool):
        super().__init__()
        self.down = nn.Conv2d(channels, width, 1)
        self.gate = None if first else nn.Parameter(torch.zeros(1))
        self.norm = LayerNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc1 = nn.Conv2d(width, expansion * width, 1)
        self.fc2 = nn.Conv2d(expansion * width, width, 1)

    def forward(self, state: Tensor | None, activation: Tensor) -> Tensor:
        x = self.down(activation)
        if self.gate is not None:
            share = torch.sigmoid(self.gate / GATE_TEMPERATURE)
            x = share * state + (1 - share) * x
        return x + self.fc2(F.gelu(self.fc1(self.depthwise(self.norm(x)))))


class Ladder(nn.Module):
    """Maps of the stages -> the same maps with the side network's state added; the maps are detached."""

    def __init__(
        self,
        rungs: Sequence[Sequence[tuple[int, int]]],
        channels: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        expansion: int,
        activations: Activations,
    ):
        """`rungs`: (block index, channels) of the tapped blocks, by stage."""
        super().__init__()
        self.activations = activations
        self.steps = [after // before for before, after in itertools.pairwise(strides)]
        self.taps = [[index for index, _ in stage] for stage in rungs]
        self.rungs = nn.ModuleList(
            nn.ModuleList(
                Rung(block_channels, width, expansion, first=stage == rung == 0)
                for rung, (_, block_channels) in enumerate(blocks)
            )
            for stage, (blocks, width) in enumerate(zip(rungs, widths, strict=True))
        )
        self.between = nn.ModuleList(nn.Conv2d(before, after, 1) for before, after in itertools.pairwise(widths))
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in widths)
        self.up = nn.ModuleList(nn.Conv2d(width, c, 1) for width, c in zip(widths, channels, strict=True))
        for layer in self.up:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        state: Tensor | None = None
        adapted = []
        for stage, feature_map in enumerate(maps):
            if stage > 0 and state is not None:
                step = self.steps[stage - 1]
                if step > 1:
                    state = F.avg_pool2d(state, step, ceil_mode=True, count_include_pad=False)
                state = self.between[stage - 1](state)
            for tap, rung in zip(self.taps[stage], self.rungs[stage], strict=True):
                activation = self.activations.by_block.pop(tap)
                if activation.shape[-2:] != feature_map.shape[-2:]:  # a block before the stage's last stride
                    activation = F.adaptive_avg_pool2d(activation, feature_map.shape[-2:])
                state = rung(state, activation)
            adapted.append(feature_map.detach() + self.up[stage](self.norms[stage](state)))
        return adapted


def ladder_parameters(
    rungs: Sequence[Sequence[int]], channels: Sequence[int], widths: Sequence[int], expansion: int
) -> int:
    """The number of a `Ladder`'s parameters in closed form; `rungs`: channels of the tapped blocks, by stage."""
    total = -1  # the first rung has no gate
    for blocks, width in zip(rungs, widths, strict=True):
        for block_channels in blocks:
            down, gate, norm, depthwise = block_channels * width + width, 1, 2 * width, 10 * width
            total += down + gate + norm + depthwise + 2 * expansion * width**2 + (expansion + 1) * width
    total += sum(before * after + after for before, after in itertools.pairwise(widths))
    return total + sum(2 * width + width * c + c for width, c in zip(widths, channels, strict=True))
