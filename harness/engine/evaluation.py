"""Computes confusion matrices from a network's predictions; metrics are computed from them in `runs/metrics.py`.

Pixels are counted at the labels' own resolution, in int64, one matrix per image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.data.augmentation import prepare
from harness.data.base import IGNORE_INDEX, Pair, Sample, SegmentationDataset
from harness.models.backbones.backbone import StageOutputs
from harness.models.losses import upsample
from harness.models.network import Segmenter
from harness.spec import Budget


def confusion(prediction: Tensor, mask: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes], rows labels, columns predictions; both maps of one shape; ignored pixels left out.

    Ignored pixels are counted in a row of their own: to leave them out first takes ten times as long on a CPU.
    Raises `ValueError` for a label of no class.
    """
    pairs = mask.int() * classes + prediction
    counts = torch.bincount(pairs.flatten(), minlength=(IGNORE_INDEX + 1) * classes).reshape(-1, classes)
    if counts[classes:IGNORE_INDEX].any():
        raise ValueError(f"a mask has labels that are neither below {classes} nor {IGNORE_INDEX}")
    return counts[:classes]


def most_likely(logits: Tensor) -> Tensor:
    """Logits [..., K, H, W] -> the class of the largest, the first of equals: int64 [..., H, W].

    As `argmax`, which takes several times as long as `max` on a CPU across a dimension that is not the innermost.
    """
    return logits.max(-3).indices


LOADERS = 4
"""Threads that decode images for the evaluation."""


@dataclass(frozen=True)
class Predictor:
    """A network with its preprocessing: turns images of any size into labels of that size."""

    network: Segmenter
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[int, int] | None
    budget: Budget
    device: torch.device
    prefix: Callable[[Tensor], StageOutputs] | None = None
    """Turns the images [B, 3, H, W] of each forward pass, in order, into the outputs of frozen stages. None: the
    network takes the images."""

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """uint8 images [H, W, 3] of one size -> uint8 labels [H, W] each, on the device."""
        height, width = images[0].shape[:2]
        batch = torch.stack([torch.from_numpy(prepare(image, self.scale, self.mean, self.std)) for image in images])
        # One image at a time: at 150 classes the upsampled logits of a single large image are a gigabyte.
        logits = self._logits(batch.to(self.device))
        return [most_likely(upsample(one[None], (height, width))[0]).byte() for one in logits]

    def _logits(self, images: Tensor) -> Iterator[Tensor]:
        """[K, H, W] of each image, at the size of the network's input."""
        if self.budget.evaluation == "slide":
            yield from self._slide(images)
            return
        for one in self._forward(images):
            yield self.network.image_logits(one[None], (images.shape[-2], images.shape[-1]))[0]

    def _forward(self, images: Tensor) -> Tensor:
        if self.budget.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.budget.precision)
        with torch.autocast(self.device.type, dtype=kind, enabled=kind is not None):
            return self.network(images if self.prefix is None else self.prefix(images))

    def _slide(self, images: Tensor) -> Tensor:
        """Mean logits over windows of the crop's size, at the images' size: [B, K, H, W].

        The last window of a row or column is moved back to end at the border; a smaller image is one window. As many
        windows as a batch has images go through the network together.
        """
        assert self.budget.stride is not None
        height, width = images.shape[-2:]
        window = (min(self.budget.crop[0], height), min(self.budget.crop[1], width))
        places = [
            (slice(top, top + window[0]), slice(left, left + window[1]))
            for top in _starts(height, window[0], self.budget.stride[0])
            for left in _starts(width, window[1], self.budget.stride[1])
        ]
        windows = [(image, place) for place in places for image in range(len(images))]
        total, count = None, torch.zeros(1, 1, height, width, device=images.device)
        for place in places:
            count[..., *place] += 1
        for first in range(0, len(windows), self.budget.batch_size):
            together = windows[first : first + self.budget.batch_size]
            logits = self._forward(torch.stack([images[image][..., *place] for image, place in together]))
            if total is None:
                total = images.new_zeros(len(images), logits.shape[1], height, width, dtype=torch.float32)
            for (image, place), one in zip(together, logits, strict=True):
                total[image][..., *place] += self.network.image_logits(one[None], window)[0]
        assert total is not None
        return total / count


def _starts(length: int, window: int, stride: int) -> list[int]:
    """The starts of windows that cover 0 .. length without exceeding it."""
    last = length - window
    return [min(start, last) for start in range(0, last + stride, stride)] if last > 0 else [0]


def confusion_matrices(
    predictor: Predictor,
    dataset: SegmentationDataset,
    samples: Sequence[Sample],
    on_image: Callable[[int, Pair, np.ndarray], None] = lambda index, pair, prediction: None,
    share: slice = slice(None),
) -> np.ndarray:
    """int64 confusion matrices [N, K, K] of the samples in `share`, in their order.

    `on_image(index, pair, prediction)` is called for each. Neighbouring images of one size go through the network
    together.
    """
    predictor.network.eval()
    classes = len(dataset.classes)
    matrices = []
    for indices, pairs in _batches(dataset, samples, share, predictor.budget.batch_size):
        for index, pair, prediction in zip(indices, pairs, predictor([pair.image for pair in pairs]), strict=True):
            mask = torch.tensor(pair.mask, device=prediction.device)
            matrices.append(confusion(prediction, mask, classes).cpu().numpy())
            on_image(index, pair, prediction.cpu().numpy())
    return np.stack(matrices) if matrices else np.zeros((0, classes, classes), np.int64)


def _batches(
    dataset: SegmentationDataset, samples: Sequence[Sample], share: slice, size: int
) -> Iterator[tuple[list[int], list[Pair]]]:
    indices: list[int] = []
    pairs: list[Pair] = []
    for index, pair in _loaded(dataset, samples, range(len(samples))[share], ahead=2 * size):
        if pairs and (len(pairs) == size or pair.image.shape != pairs[0].image.shape):
            yield indices, pairs
            indices, pairs = [], []
        indices.append(index)
        pairs.append(pair)
    if pairs:
        yield indices, pairs


def _loaded(
    dataset: SegmentationDataset, samples: Sequence[Sample], indices: range, ahead: int
) -> Iterator[tuple[int, Pair]]:
    """Pairs in order; up to `ahead` of them are decoded by other threads while the network computes."""
    waiting: deque[tuple[int, Future[Pair]]] = deque()
    for index in indices[:1]:
        yield (
            index,
            dataset.load(samples[index]),
        )  # before the threads: loading may fill a shared cache
    with ThreadPoolExecutor(LOADERS) as threads:
        try:
            for index in indices[1:]:
                waiting.append((index, threads.submit(dataset.load, samples[index])))
                if len(waiting) > ahead:
                    first, pair = waiting.popleft()
                    yield first, pair.result()
            for first, pair in waiting:
                yield first, pair.result()
        finally:
            threads.shutdown(cancel_futures=True)
