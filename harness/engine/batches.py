"""The inputs of a run's forward passes: augmented images, or the outputs of a backbone's frozen stages for them.

At one seed all methods and trials see the same images in the same order, so the outputs of stages that all of them
leave frozen are the same too: they are computed once for all networks that train side by side, and may be cached.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from harness.data.augmentation import TrainStream
from harness.errors import UserError
from harness.features.cached_prefix import CachedPass, CachedPrefix
from harness.features.policy import WritePolicy
from harness.features.store import FeatureStream
from harness.models.backbones.backbone import StagedBackbone, StageOutputs
from harness.spec import Budget


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass, on the device. Images [B, 3, H, W], masks [B, H, W]."""

    masks: Tensor
    images: Tensor | None
    """None if every network starts after a frozen stage."""
    prefix: StageOutputs | None
    waited: float
    """Seconds for the data, and below for each stage of the prefix, as measured when they were computed."""
    stage_seconds: tuple[float, ...] = ()
    cached: bool = False
    """Whether the prefix was read from the cache."""
    timed: bool = False
    """Whether the stages are timed, for which the device is waited for."""
    spent: float = 0.0
    """Seconds that making this batch actually took."""

    def behind(self, stages: int) -> Tensor | StageOutputs:
        """The input of a network whose first `stages` stages are frozen."""
        if self.prefix is not None and stages:
            return self.prefix.first(stages)
        assert self.images is not None
        return self.images

    def seconds(self, stages: int) -> float:
        """Seconds that the shared part of a pass would take if the network trained alone."""
        return self.waited + sum(self.stage_seconds[:stages])


class Trainee(Protocol):
    """What the batch source needs to know about a network in training."""

    @property
    def backbone(self) -> StagedBackbone: ...

    @property
    def frozen_stages(self) -> int: ...


class BatchSource:
    """The batches of one seed, in order, for all networks that train on them side by side."""

    def __init__(
        self,
        stream: TrainStream,
        budget: Budget,
        fabric: Fabric,
        workers: int,
        trainees: Sequence[Trainee],
        features: FeatureStream | None = None,
        policy: WritePolicy | None = None,
    ):
        """`features`: where outputs of frozen stages are cached; `policy`: whether this run adds to them.

        Raises `UserError` for a batch that the processes cannot share equally.
        """
        deepest = max(trainees, key=lambda trainee: trainee.frozen_stages)
        self._stream, self._budget, self._fabric, self._workers = stream, budget, fabric, workers
        self._prefix: CachedPrefix | None = None
        if deepest.frozen_stages and (len(trainees) > 1 or features is not None):
            self._prefix = CachedPrefix(
                deepest.backbone,
                deepest.frozen_stages,
                fabric.device,
                features,
                policy,
                inputs=("masks",),
                shared=len(trainees) > 1,
            )
        self._needs_images = any(trainee.frozen_stages == 0 for trainee in trainees)
        size = budget.batch_size // budget.accumulate
        if size % fabric.world_size:
            raise UserError(
                f"{size} images per forward pass cannot be shared by {fabric.world_size} processes; "
                "use a number of processes that divides it"
            )
        self._share = size // fabric.world_size
        self._positions = range(fabric.global_rank * self._share, budget.steps * budget.batch_size, size)

    def passes(self, start: int) -> Iterator[Batch]:
        """From forward pass `start` on, `accumulate` passes per step; the shares of all processes form one pass."""
        passes = range(start, len(self._positions))
        cached = {index for index in passes if self._is_cached(index)}
        loader = iter(self._loader([index for index in passes if index not in cached]))
        for index in passes:
            started = time.monotonic()
            batch = self._read(index) if index in cached else None
            if batch is None:
                batch = self._compute(index, iter([self._load(index)]) if index in cached else loader)
            yield replace(batch, spent=time.monotonic() - started)

    def close(self) -> None:
        if self._prefix is not None:
            self._prefix.close()

    def _is_cached(self, index: int) -> bool:
        return self._prefix is not None and not self._needs_images and self._prefix.has(index)

    def _read(self, index: int) -> Batch | None:
        """None if the cache lost the pass since this run started: it was damaged or evicted."""
        assert self._prefix is not None
        found = self._prefix.read(index, self._budget.crop)
        if found is None:
            return None
        masks = found.inputs["masks"]
        with self._fabric.autocast():
            found = self._prefix.complete(index, found)
        return _behind(found, self._fabric.to_device(masks.tensor), None, masks.seconds)

    def _compute(self, index: int, loader: Iterator[tuple[Tensor, Tensor]]) -> Batch:
        started = time.monotonic()
        images, masks = next(loader)
        waited = time.monotonic() - started
        images, masks = self._fabric.to_device((images, masks))
        if self._budget.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self._prefix is None:
            return Batch(masks, images, None, waited)
        with self._fabric.autocast():
            found = self._prefix.complete(index, images, {"masks": (masks, waited)})
        return _behind(found, masks, images, waited)

    def _loader(self, indices: list[int]) -> DataLoader[tuple[Tensor, Tensor]]:
        workers = self._workers if indices else 0
        return DataLoader(
            self._stream,
            batch_sampler=[list(self._images_of(index)) for index in indices],
            num_workers=workers,
            # In a job's process the default is a fork server, whose workers would import and decode everything again.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            worker_init_fn=_ignore_interrupts,
            pin_memory=self._fabric.device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )

    def _load(self, index: int) -> tuple[Tensor, Tensor]:
        """Make the batch without the loader, which only makes passes that were not cached when it started."""
        images, masks = default_collate([self._stream[at] for at in self._images_of(index)])
        return images, masks

    def _images_of(self, index: int) -> range:
        return range(self._positions[index], self._positions[index] + self._share)


def _behind(found: CachedPass, masks: Tensor, images: Tensor | None, waited: float) -> Batch:
    return Batch(masks, images, found.outputs, waited, found.seconds, found.cached > 0, found.timed)


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C, which reaches the whole process group: the training loop ends the workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
