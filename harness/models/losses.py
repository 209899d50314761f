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

    The pixels are flattened because the two-dimensional kernel has no deterministic form on a GPU. On a CPU it takes a
    quarter of the time with few classes, and is used where it has the same bits: see `_same_in_two_dimensions`.
    """
    logits, labels = logits.float(), labels.long()
    if not _same_in_two_dimensions(logits):
        logits, labels = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]), labels.reshape(-1)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def _same_in_two_dimensions(logits: Tensor) -> bool:
    """Whether torch adds up the K exponentials of a pixel in one order with pixels flattened and not.

    A CPU's vectors have 8 or 16 numbers. With fewer classes both kernels add one after the other; and no pixel must be
    left over from vectors across pixels, since single numbers have another exponential.
    """
    return logits.device.type == "cpu" and logits.shape[1] < 8 and logits.shape[-2:].numel() % 16 == 0


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [B, K, h, w] -> float32 [B, K, H, W], bilinear, corners not aligned."""
    return resample(logits.float(), size)
