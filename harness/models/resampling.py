"""Bilinear resampling and average pooling whose gradients repeat to the bit on a GPU, and are fast there.

Both are linear in rows and in columns, so on a GPU they are two matrix products. torch's own gradient kernels add up
in no fixed order there; for deterministic mode it has another form of bilinear resampling, which takes 20 to 40 times
as long and three times the memory (`docs/performance.md`). On a CPU torch's kernels are used.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, C, h, w] -> [B, C, H, W] of the same type; corners are not aligned."""
    if maps.shape[-2:] == size:
        return maps
    if maps.device.type != "cuda":
        return F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return _by_products(maps, size, _bilinear_weights)


def average_pool(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, C, h, w] -> [B, C, H, W] of the same type: means over the cells of a grid, as `adaptive_avg_pool2d`."""
    if maps.device.type != "cuda":
        return F.adaptive_avg_pool2d(maps, size)
    return _by_products(maps, size, _pooling_weights)


class AveragePool(nn.Module):
    """`average_pool` to a fixed size."""

    def __init__(self, size: int | tuple[int, int]):
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size

    def forward(self, maps: Tensor) -> Tensor:
        return average_pool(maps, self.size)


class Functional:
    """Stands for `torch.nn.functional` in mmsegmentation's `resize`."""

    @staticmethod
    def interpolate(
        input: Tensor,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
    ) -> Tensor:
        if mode == "bilinear" and size is not None and not align_corners:
            return bilinear(input, (int(size[0]), int(size[1])))
        return F.interpolate(input, size, scale_factor, mode, align_corners)


def _by_products(maps: Tensor, size: tuple[int, int], weights: Any) -> Tensor:
    rows, columns = (weights(old, new, maps.device, maps.dtype) for old, new in zip(maps.shape[-2:], size, strict=True))
    with torch.autocast(maps.device.type, enabled=False):  # which would round float32 logits
        return rows @ maps @ columns.T


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _bilinear_weights(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[new, old]: the share of each old position in each new one."""
    at = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).clamp(0, old - 1)
    below = at.floor().long()
    above = (below + 1).clamp(max=old - 1)
    weights = torch.zeros(new, old, dtype=torch.float64)
    index = torch.arange(new)
    weights[index, below] += 1 - (at - below)
    weights[index, above] += at - below
    return weights.to(device, dtype)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _pooling_weights(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[new, old]: the share of each old position in each new one."""
    position, cell = torch.arange(old), torch.arange(new)[:, None]
    first, last = cell * old // new, -(-(cell + 1) * old // new)
    weights = ((position >= first) & (position < last)).double()
    return (weights / weights.sum(1, keepdim=True)).to(device, dtype)
