"""Learned prompts in the input space (VPT): tokens before the patches, and pixels around the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.models.resampling import resample


class PromptTokens(nn.Module):
    """Block index -> prompt tokens [length, C]; dropped out in training."""

    def __init__(self, depth: int, length: int, channels: int, patch: int, dropout: float):
        """`depth` 1 is VPT-shallow. `patch` is the side of a patch in pixels, for the initialisation."""
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(depth, length, channels))
        self.dropout = nn.Dropout(dropout)
        bound = math.sqrt(6 / (3 * patch**2 + channels))  # Xavier's, as if the tokens were a patch embedding
        nn.init.uniform_(self.tokens, -bound, bound)

    def forward(self, block: int) -> Tensor:
        return self.dropout(self.tokens[block])


class Border(nn.Module):
    """Pixels around the image, and the maps cut back to the image.

    `surround` makes the image larger by `margin` pixels on each side: `width` of its own, next to the image, and
    outside of them the mean colour (zero), so that `margin` is a multiple of every stride. `forward`, at the other end,
    crops the cells of the margin from the maps. What remains has the size and the position of the image's own maps.

    The pixels are stored for an image of `side`; along its borders they are resampled to the size of each image. They
    are parameters if they are `learned`, and else buffers, which a delta stores as well.
    """

    top_bottom: Tensor
    left_right: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        width: int,
        side: int,
        strides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        learned: bool = True,
    ):
        super().__init__()
        self.width = width
        self.strides = tuple(strides)
        self.margin = math.ceil(width / max(strides)) * max(strides)
        top_bottom, left_right = torch.rand(1, 3, 2 * width, side + 2 * width), torch.rand(1, 3, side, 2 * width)
        for name, pixels in (("top_bottom", top_bottom), ("left_right", left_right)):
            if learned:
                self.register_parameter(name, nn.Parameter(pixels))
            else:
                self.register_buffer(name, pixels)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def surround(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, H + 2·margin, W + 2·margin], both normalised."""
        batch, _, height, width = images.shape
        side = self._colours(self.left_right, (height, 2 * self.width)).to(images.dtype).expand(batch, -1, -1, -1)
        left, right = side.split(self.width, dim=3)
        wide = torch.cat([left, images, right], dim=3)
        edge = self._colours(self.top_bottom, (2 * self.width, width + 2 * self.width)).to(images.dtype)
        top, bottom = edge.expand(batch, -1, -1, -1).split(self.width, dim=2)
        framed = torch.cat([top, wide, bottom], dim=2)
        return F.pad(framed, (self.margin - self.width,) * 4)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """[B, C_i, (H' + 2·margin)/s_i, ...] -> [B, C_i, H'/s_i, ...] for a canvas H'×W' of the image."""
        cells = [self.margin // stride for stride in self.strides]
        return [x[..., n : x.shape[-2] - n, n : x.shape[-1] - n] for x, n in zip(maps, cells, strict=True)]

    def _colours(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Normalised pixels, resampled so that each has a share in a smaller image as well."""
        if pixels.shape[-2:] != size:
            pixels = resample(pixels, size, antialias=True)
        return (pixels - self.mean) / self.std


@dataclass(eq=False)
class Surround:
    """Before the backbone's forward pass: its images with their border."""

    border: Border

    def __call__(self, backbone: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        images, *rest = inputs
        return (self.border.surround(images), *rest)
