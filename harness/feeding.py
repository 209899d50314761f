"""What the forward passes of a run are fed: augmented images, or what a backbone's untouched stages made of them.

At one seed all methods and trials see the same images in the same order, so the outputs of stages that none of them
touches are the same too: they are computed once for all that are trained side by side, and may be kept for others.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from harness.backbones.staged import Prefix, StagedBackbone
from harness.datasets.transforms import TrainStream
from harness.errors import UserError
from harness.features import CHUNK, FeatureStream
from harness.spec import Budget


@dataclass(frozen=True)
class Given:
    """What one forward pass is fed, on the device."""

    masks: Tensor
    images: Tensor | None
    """None where all that are fed begin behind a stage."""
    prefix: Prefix | None
    waited: float
    """Seconds for the data, and below for each stage of the prefix: what they took when they were computed."""
    stage_seconds: tuple[float, ...] = ()
    reused: bool = False
    """Whether the prefix was kept from an earlier run."""
    spent: float = 0.0
    """Seconds until it was given, here and now."""

    def behind(self, stages: int) -> Tensor | Prefix:
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
    untouched: int


@dataclass
class Keeping:
    """Whether what a prefix makes of the training images is kept for others: decided by what it costs and saves.

    After the first chunk of passes, computing, writing and reading are known by measurement.
    """

    stream: FeatureStream
    limit: int
    """Bytes that all that is kept may take; one run's training takes half of them at most."""
    more: int
    """How many further runs are expected that see the same images."""
    passes: int
    say: Callable[[str], None]
    on: bool = field(init=False)
    _bytes: int = 0
    _writing: float = 0.0
    _computing: float = 0.0
    _seen: int = 0

    def __post_init__(self) -> None:
        self.on = self.more > 0 and self.limit > 0

    def keep(self, index: int, tensors: dict[str, tuple[Tensor, float]]) -> None:
        """Write what one pass computed, as long as that pays."""
        size = sum(tensor.numel() * tensor.element_size() for tensor, _ in tensors.values())
        if not self._seen and (expected := size * (self.passes - index)) > self.limit / 2:
            self._stop(f"{_bytes(expected)} of them would be more than half of --cache-size")
            return
        began = time.monotonic()
        written = self.stream.write(index, tensors)
        self._writing += time.monotonic() - began
        self._bytes += size
        if self._seen:  # the first pass also warms up
            self._computing += sum(seconds for _, seconds in tensors.values())
        self._seen += 1
        if not written:
            self._stop("they could not be written")
        elif (index + 1) % CHUNK == 0 and self._seen <= 2 * CHUNK:
            self._decide(index, list(tensors))

    def _decide(self, index: int, names: list[str]) -> None:
        began = time.monotonic()
        found = self.stream.read(index, names)
        if found is None:
            return
        reading = time.monotonic() - began
        computing = self._computing / max(1, self._seen - 1)
        writing = self._writing / self._seen
        costs = f"computing {computing:.3f} s a pass, reading {reading:.3f} s, writing {writing:.3f} s"
        if self.more * (computing - reading) <= writing:
            self._stop(costs)
        elif self._seen <= CHUNK:
            size = _bytes(self._bytes / self._seen * self.passes)
            self.say(f"keeping what the untouched stages make of the training images for other runs: {size}; {costs}")

    def _stop(self, reason: str) -> None:
        self.on = False
        self.say(f"not keeping what the untouched stages make of the training images: {reason}")


class Feeder:
    """The forward passes of one seed, in order, for all networks that are trained on them side by side."""

    def __init__(
        self,
        stream: TrainStream,
        budget: Budget,
        fabric: Fabric,
        workers: int,
        fed: Sequence[Fed],
        kept: FeatureStream | None = None,
        keeping: Keeping | None = None,
    ):
        """`kept`: where the prefixes of earlier runs are looked for; `keeping`: whether this run adds to them."""
        deepest = max(fed, key=lambda one: one.untouched)
        self._stream, self._budget, self._fabric, self._workers = stream, budget, fabric, workers
        self._backbone = deepest.backbone
        shared = len(fed) > 1 or kept is not None
        self._stages = deepest.untouched if shared else 0
        self._images_needed = any(one.untouched == 0 for one in fed)
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

    def passes(self, start: int) -> Iterator[Given]:
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

    def _computed(self, index: int, loader: Iterator[tuple[Tensor, Tensor]]) -> Given:
        began = time.monotonic()
        images, masks = next(loader)
        waited = time.monotonic() - began
        images, masks = self._fabric.to_device((images, masks))
        if self._budget.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if not self._stages:
            return Given(masks, images, None, waited)
        return self._go_on(index, Given(masks, images, None, waited), 0)

    def _reused(self, index: int) -> Given:
        assert self._kept is not None
        for stages in range(self._stages, 0, -1):
            found = self._kept.read(index, names(stages)) if self._kept.has(index, names(stages)) else None
            if found is not None:
                outputs = [self._fabric.to_device(found[name].tensor) for name in names(stages)[1:]]
                seconds = tuple(found[name].seconds for name in names(stages)[1:])
                prefix = Prefix(outputs, self._budget.crop)
                masks = self._fabric.to_device(found["masks"].tensor)
                given = Given(masks, None, prefix, found["masks"].seconds, seconds, reused=True)
                return self._go_on(index, given, stages)
        # It was there when this run began, and is damaged or was given up for something newer since.
        return self._computed(index, iter([default_collate([self._stream[at] for at in self._images_of(index)])]))

    def _go_on(self, index: int, given: Given, stages: int) -> Given:
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
        return Given(given.masks, given.images, prefix, given.waited, tuple(seconds), given.reused)

    def _clock(self) -> float:
        if self._fabric.device.type == "cuda":
            torch.cuda.synchronize(self._fabric.device)
        return time.monotonic()


def names(stages: int) -> list[str]:
    """Under which the labels and the first stages' outputs of a pass are kept."""
    return ["masks", *(f"stage{i}" for i in range(stages))]


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the loop decides, and ends the workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{math.ceil(number / 1e6)} MB"
