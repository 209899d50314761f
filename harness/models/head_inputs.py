"""What a head does to the backbone's maps before mmsegmentation's decoder reads them: norms, and padding to even."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn


class OutputNorms(nn.ModuleDict):
    """A LayerNorm over the channels of each map that the head reads; the other maps pass unchanged.

    mmsegmentation counts these norms as the backbone's. Here they are the head's: trained for every method alike.
    """

    def __init__(self, channels: Sequence[int], stages: Iterable[int]):
        """`channels` of all maps; `stages` (0-based) are those that the head reads."""
        super().__init__({str(stage): LayerNorm2d(channels[stage]) for stage in stages})

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self._normed(x, self[str(stage)]) if str(stage) in self else x for stage, x in enumerate(maps)]

    @staticmethod
    def _normed(x: Tensor, norm: nn.Module) -> Tensor:
        """In the map's own memory layout: the norm leaves channels last, and so would the convolutions after it."""
        return norm(x).contiguous() if x.is_contiguous() else norm(x)


class OnEvenGrid(nn.Sequential):
    """Modules of which one halves maps of one resolution: the last row or column of an odd map is repeated before them,
    and cropped from the logits. Otherwise the halved map would lack the last cells, and upsampling would stretch it."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        height, width = maps[0].shape[-2:]
        logits: Tensor = super().forward([_even(_even(x, -2), -1) for x in maps])
        scale = logits.shape[-2] // (height + height % 2)
        return logits[..., : height * scale, : width * scale]


def _even(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1)], dim) if x.shape[dim] % 2 else x
