"""Turns pairs into network inputs: mmsegmentation's standard augmentation, as a pure function of a seed.

The transforms are mmcv's and mmseg's; this module makes them reproducible, and provides the stream of training samples,
which is the same for every method.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from harness.data.base import IGNORE_INDEX, Pair, Sample, SegmentationDataset
from harness.spec import Budget
from harness.util.quiet import quiet_imports

with quiet_imports():
    import mmcv
    from mmcv.transforms import RandomResize
    from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop, RandomFlip

CACHED_BYTES = 512 * 2**20
"""Memory for decoded pairs in each process; pairs beyond it are decoded again on every use."""

_ORDER, _AUGMENTATION = 0, 1  # Two independent families of random numbers under one seed.


class Augmentation:
    """Random resize, crop, flip and photometric distortion as mmsegmentation's configs, then normalisation.

    `scale` is the dataset's (long, short) side, or None for each image's own size; the budget's `resize`
    range multiplies it. `mean` and `std` are RGB, in units of 0..1, as in timm.
    """

    def __init__(
        self,
        budget: Budget,
        scale: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._scale = scale
        self._crop = budget.crop
        self._resize = RandomResize(scale=scale or (1, 1), ratio_range=budget.resize, keep_ratio=True)
        self._geometry = [
            self._resize,
            RandomCrop(crop_size=budget.crop, cat_max_ratio=0.75, ignore_index=IGNORE_INDEX),
            RandomFlip(prob=budget.flip),
        ]
        self._photometric = PhotoMetricDistortion() if budget.photometric else None
        self._mean, self._std = mean, std

    def __call__(self, pair: Pair, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 [3, H, W], normalised RGB, and uint8 [H, W], of the crop's size; `seed` is 0..2**32 - 1.

        The crop is padded on the right and below as by mmseg's preprocessor: zero after normalisation, ignored in the
        mask. The result only depends on the arguments. Not thread-safe: the transforms use the global generators.
        """
        results: dict[str, Any] = {"img": pair.image, "gt_seg_map": pair.mask, "seg_fields": ["gt_seg_map"]}
        height, width = pair.mask.shape
        self._resize.scale = self._scale or (width, height)
        with _seeded(seed):
            for transform in self._geometry:
                results = transform(results)
            if self._photometric is not None:
                # It expects BGR; the geometry before it works on either.
                results["img"] = results["img"][..., ::-1]
                results = self._photometric(results)
                results["img"] = results["img"][..., ::-1]
        image = np.zeros((3, *self._crop), np.float32)
        mask = np.full(self._crop, IGNORE_INDEX, np.uint8)
        height, width = results["gt_seg_map"].shape
        _normalise(results["img"], self._mean, self._std, out=image[:, :height, :width])
        mask[:height, :width] = results["gt_seg_map"]
        return image, mask


def prepare(
    image: np.ndarray, scale: tuple[int, int] | None, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """For evaluation: uint8 [H, W, 3] RGB -> normalised float32 [3, h, w], resized to `scale` at its aspect ratio."""
    if scale is not None:
        image = mmcv.imrescale(image, scale)
    prepared = np.empty((3, *image.shape[:2]), np.float32)
    _normalise(image, mean, std, out=prepared)
    return prepared


class TrainStream(torch.utils.data.Dataset):
    """The training samples of a run by position, 0 .. steps * batch_size - 1, to be read in that order.

    An item is (image float32 [3, H, W], mask uint8 [H, W]); masks become int64 on the device, which saves 7/8 of their
    transfer. Items depend on samples, budget, seed, mean and std alone: not on the method, on workers, or on where a
    run was resumed. Every epoch is a permutation of all samples.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        samples: Sequence[Sample],
        budget: Budget,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._dataset = dataset
        self._samples = samples
        self._augmentation = Augmentation(budget, dataset.scale, mean, std)
        self._length = budget.steps * budget.batch_size
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, np.intp)
        self._pairs: dict[int, Pair] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= position < self._length:
            raise IndexError(position)
        seed = np.random.SeedSequence((self._seed, _AUGMENTATION, position)).generate_state(1)[0]
        image, mask = self._augmentation(self._pair(self.index(position)), int(seed))
        return torch.from_numpy(image), torch.from_numpy(mask)

    def index(self, position: int) -> int:
        """The index of the sample at `position`."""
        epoch, place = divmod(position, len(self._samples))
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self._seed, _ORDER, epoch))))
            self._order, self._epoch = generator.permutation(len(self._samples)), epoch
        return int(self._order[place])

    def _pair(self, index: int) -> Pair:
        pair = self._pairs.get(index)
        if pair is None:
            pair = self._dataset.load(self._samples[index])
            size = pair.image.nbytes + pair.mask.nbytes
            if self._bytes + size <= CACHED_BYTES:
                self._pairs[index] = pair
                self._bytes += size
        return pair


def _normalise(image: np.ndarray, mean: Sequence[float], std: Sequence[float], out: np.ndarray) -> None:
    """uint8 [H, W, 3] to float32 [3, H, W] in `out`."""
    factor = 1 / (255 * np.asarray(std, np.float64))
    offset = np.divide(mean, std)
    for channel in range(3):
        np.multiply(image[..., channel], np.float32(factor[channel]), out=out[channel])
        out[channel] -= np.float32(offset[channel])


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which the transforms use, and restore their state afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
