"""Resampling and average pooling whose gradients repeat to the bit on a GPU, and are fast there.

They are linear in rows and in columns, so on a GPU they are two matrix products. torch's own gradient kernels add up in
no fixed order there; for deterministic mode it has another form of bilinear resampling, which takes 20 to 40 times as
long and three times the memory (`docs/performance.md`). On a CPU torch's kernels are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Interpolation = Literal["bilinear", "bicubic", "average"]


def resample(maps: Tensor, size: tuple[int, int], kind: Interpolation = "bilinear", antialias: bool = False) -> Tensor:
    """Maps [B, C, h, w] -> [B, C, H, W] of the same type; corners are not aligned.

    `average`: means over the cells of a grid, as `adaptive_avg_pool2d`.
    """
    if maps.shape[-2:] == size:
        return maps
    if maps.device.type != "cuda":
        return _by_kernel(maps, size, kind, antialias)
    return _by_products(maps, size, kind, antialias)


class AveragePool(nn.Module):
    """Means over the cells of a fixed grid."""

    def __init__(self, size: int | tuple[int, int]):
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size

    def forward(self, maps: Tensor) -> Tensor:
        return resample(maps, self.size, "average")


def resample_in(module: ModuleType) -> None:
    """Let a library's module, which calls `F.interpolate`, resample as this one does."""
    module.F = _Functional()  # type: ignore[attr-defined]  # its name for torch.nn.functional


class _Functional:
    """`torch.nn.functional` with another `interpolate`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    @staticmethod
    def interpolate(
        input: Tensor,
        size: Sequence[int] | None = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        *,
        antialias: bool = False,
    ) -> Tensor:
        if size is not None and mode in ("bilinear", "bicubic") and not align_corners:
            return resample(input, (int(size[0]), int(size[1])), mode, antialias)  # type: ignore[arg-type]
        return F.interpolate(input, size, scale_factor, mode, align_corners, antialias=antialias)


def _by_kernel(maps: Tensor, size: tuple[int, int], kind: Interpolation, antialias: bool) -> Tensor:
    if kind == "average":
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size, mode=kind, align_corners=False, antialias=antialias)


def _by_products(maps: Tensor, size: tuple[int, int], kind: Interpolation, antialias: bool) -> Tensor:
    rows, columns = (
        _weights(old, new, kind, antialias, maps.device, maps.dtype)
        for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    with torch.autocast(maps.device.type, enabled=False):  # which would round float32 logits
        return rows @ maps @ columns.T


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _weights(
    old: int, new: int, kind: Interpolation, antialias: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[new, old]: the share of each old position in each new one, read off the kernel on a CPU."""
    every_position = torch.eye(old, dtype=torch.float64)[None, None]
    return _by_kernel(every_position, (new, old), kind, antialias)[0, 0].to(device, dtype)
