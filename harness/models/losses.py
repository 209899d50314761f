"""The cross-entropy of heads and auxiliary maps, and labels at a map's size."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from harness.data.base import IGNORE_INDEX
from harness.models.resampling import resample


def labels_at(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels [B, H, W] sampled at the centres of the cells of a [h, w] grid: int64 [B, h, w]."""
    if masks.shape[-2:] == size:
        return masks.long()
    return F.interpolate(masks[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled pixels, in float32: logits [B, K, h, w], labels [B, h, w]. 0 where no pixel is labelled.

    The pixels are flattened because the two-dimensional kernel has no deterministic form on a GPU.
    """
    flat = logits.float().permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
    labels = labels.reshape(-1).long()
    total = F.cross_entropy(flat, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [B, K, h, w] -> float32 [B, K, H, W], bilinear, corners not aligned."""
    return resample(logits.float(), size)
