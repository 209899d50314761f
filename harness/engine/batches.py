"""What the forward passes of a run are fed: augmented images, or what a backbone's untouched stages made of them.

At one seed all methods and trials see the same images in the same order, so the outputs of stages that none of them
touches are the same too: they are computed once for all that are trained side by side, and may be kept for others.
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
from harness.features.keys import names
from harness.features.policy import FeatureCachePolicy
from harness.features.store import FeatureStream
from harness.models.backbones.backbone import StagedBackbone, StageOutputs
from harness.spec import Budget


@dataclass(frozen=True)
class Batch:
    """What one forward pass is fed, on the device."""

    masks: Tensor
    images: Tensor | None
    """None where all that are fed begin behind a stage."""
    prefix: StageOutputs | None
    waited: float
    """Seconds for the data, and below for each stage of the prefix: what they took when they were computed."""
    stage_seconds: tuple[float, ...] = ()
    reused: bool = False
    """Whether the prefix was kept from an earlier run."""
    spent: float = 0.0
    """Seconds until it was given, here and now."""

    def behind(self, stages: int) -> Tensor | StageOutputs:
        """What a network with so many untouched stages takes."""
        if self.prefix is not None and stages:
            return self.prefix.first(stages)
        assert self.images is not None
        return self.images

    def seconds(self, stages: int) -> float:
        """What the part of a pass that is not done again for each network would take one that is trained alone."""
        return self.waited + sum(self.stage_seconds[:stages])


class Fed(Protocol):
    """What feeding has to know of a network that is trained."""

    backbone: StagedBackbone
    frozen_stages: int


class BatchSource:
    """The forward passes of one seed, in order, for all networks that are trained on them side by side."""

    def __init__(
        self,
        stream: TrainStream,
        budget: Budget,
        fabric: Fabric,
        workers: int,
        fed: Sequence[Fed],
        kept: FeatureStream | None = None,
        keeping: FeatureCachePolicy | None = None,
    ):
        """`kept`: where the prefixes of earlier runs are looked for; `keeping`: whether this run adds to them."""
        deepest = max(fed, key=lambda one: one.frozen_stages)
        self._stream, self._budget, self._fabric, self._workers = stream, budget, fabric, workers
        self._backbone = deepest.backbone
        shared = len(fed) > 1 or kept is not None
        self._stages = deepest.frozen_stages if shared else 0
        self._images_needed = any(one.frozen_stages == 0 for one in fed)
        self._kept = kept if self._stages else None
        self._keeping = keeping if self._stages else None
        size = budget.batch_size // budget.accumulate
        if size % fabric.world_size:
            raise UserError(
                f"{size} images a forward pass cannot be shared by {fabric.world_size} processes; "
                "start a number that divides them"
            )
        self._share = size // fabric.world_size
        self._positions = range(fabric.global_rank * self._share, budget.steps * budget.batch_size, size)

    def passes(self, start: int) -> Iterator[Batch]:
        """From forward pass `start` on, `accumulate` of them a step; the shares of all processes are one pass."""
        passes = range(start, len(self._positions))
        kept = {index for index in passes if self._is_kept(index)}
        loader = iter(self._load([index for index in passes if index not in kept]))
        for index in passes:
            began = time.monotonic()
            given = self._reused(index) if index in kept else self._computed(index, loader)
            yield replace(given, spent=time.monotonic() - began)

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()

    def _load(self, indices: list[int]) -> DataLoader[tuple[Tensor, Tensor]]:
        workers = self._workers if indices else 0
        return DataLoader(
            self._stream,
            batch_sampler=[self._images_of(index) for index in indices],
            num_workers=workers,
            # A job's process was itself started otherwise, and would have its workers import and decode all anew.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            worker_init_fn=_ignore_interrupts,
            pin_memory=self._fabric.device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )

    def _images_of(self, index: int) -> range:
        return range(self._positions[index], self._positions[index] + self._share)

    def _is_kept(self, index: int) -> bool:
        return self._kept is not None and not self._images_needed and self._kept.has(index, names(1))

    def _computed(self, index: int, loader: Iterator[tuple[Tensor, Tensor]]) -> Batch:
        began = time.monotonic()
        images, masks = next(loader)
        waited = time.monotonic() - began
        images, masks = self._fabric.to_device((images, masks))
        if self._budget.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if not self._stages:
            return Batch(masks, images, None, waited)
        return self._go_on(index, Batch(masks, images, None, waited), 0)

    def _reused(self, index: int) -> Batch:
        assert self._kept is not None
        for stages in range(self._stages, 0, -1):
            found = self._kept.read(index, names(stages)) if self._kept.has(index, names(stages)) else None
            if found is not None:
                outputs = [self._fabric.to_device(found[name].tensor) for name in names(stages)[1:]]
                seconds = tuple(found[name].seconds for name in names(stages)[1:])
                prefix = StageOutputs(outputs, self._budget.crop)
                masks = self._fabric.to_device(found["masks"].tensor)
                given = Batch(masks, None, prefix, found["masks"].seconds, seconds, reused=True)
                return self._go_on(index, given, stages)
        # It was there when this run began, and is damaged or was given up for something newer since.
        return self._computed(index, iter([default_collate([self._stream[at] for at in self._images_of(index)])]))

    def _go_on(self, index: int, given: Batch, stages: int) -> Batch:
        """Compute the stages that are not there yet, and keep what is new."""
        prefix, seconds = given.prefix, list(given.stage_seconds)
        for stage in range(stages, self._stages):
            began = self._clock()
            with self._fabric.autocast():
                prefix = self._backbone.prefix(prefix if prefix is not None else given.images, stage + 1)
            seconds.append(self._clock() - began)
        assert prefix is not None
        if self._keeping is not None and self._keeping.on and stages < self._stages:
            new = {} if stages else {"masks": (given.masks, given.waited)}
            new |= {f"stage{i}": (prefix.outputs[i], seconds[i]) for i in range(stages, self._stages)}
            self._keeping.keep(index, new)
        return Batch(given.masks, given.images, prefix, given.waited, tuple(seconds), given.reused)

    def _clock(self) -> float:
        if self._fabric.device.type == "cuda":
            torch.cuda.synchronize(self._fabric.device)
        return time.monotonic()


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the loop decides, and ends the workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
