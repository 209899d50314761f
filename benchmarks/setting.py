"""The common setting of all measurements: data, head, schedule and device; and the networks for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import Clock
from harness.cells.resolve import Cell, Request, Resolver
from harness.data.augmentation import TrainStream
from harness.data.splits import split_samples
from harness.engine.training import parameter_groups
from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.weights import load_backbone
from harness.models.network import Segmenter, apply_memory_format, build_segmenter
from harness.runs.store import RunStore
from harness.spec import Budget
from harness.util.seeds import derive

BATCHES = 4
"""The largest number of different batches for timing single steps."""


@dataclass(frozen=True)
class Setting:
    """Everything except method and backbone. Weights are random by default: step costs do not depend on them."""

    dataset: str
    head: str
    weights: str
    budget: Budget
    rounds: int
    workers: int
    data: Path
    scratch: Path
    fabric: Fabric
    clock: Clock

    @cached_property
    def _resolver(self) -> Resolver:
        return Resolver(RunStore(self.scratch / "runs"), self.data)

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    def cell(self, backbone: str, method: str, seed: int = 0, **settings: float) -> Cell:
        """Raises `UserError` for an unknown name."""
        return self._resolver(
            Request(
                method=method,
                backbone=backbone,
                weights=self.weights,
                dataset=self.dataset,
                head=self.head,
                budget=self.budget,
                seed=seed,
                settings=settings,
            )
        )

    def pretrained(self, cell: Cell) -> StagedBackbone:
        return load_backbone(cell.spec.backbone, cell.weights, derive(cell.spec.seed, "backbone"))

    def network(self, cell: Cell) -> Segmenter:
        """The network as a run builds it, on the device, in training mode. Raises `UnsupportedMethod`."""
        spec, classes = cell.spec, len(cell.dataset.classes)
        network = build_segmenter(self.pretrained(cell), cell.new_method(), spec.head, classes, spec.seed)
        apply_memory_format(network.to(self.device), self.budget)
        return network.train()

    def images(self, images: Tensor) -> Tensor:
        """The images on the device, in the memory layout of a run."""
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last) if self.budget.channels_last else images

    def stream(self, cell: Cell, network: Segmenter) -> TrainStream:
        """The images that a run of the cell trains on, in its order."""
        spec, backbone = cell.spec, network.backbone
        samples, _ = split_samples(cell.dataset, spec.part, spec.budget.dev_fraction)
        return TrainStream(cell.dataset, samples, spec.budget, derive(spec.seed, "data"), backbone.mean, backbone.std)

    def batches(self, cell: Cell, network: Segmenter) -> list[tuple[Tensor, Tensor]]:
        """The first few, on the device: images [B, 3, H, W] and masks [B, H, W]."""
        loader = DataLoader(self.stream(cell, network), batch_size=self.budget.batch_size)
        first = itertools.islice(loader, BATCHES)
        return [(self.images(images), masks.to(self.device)) for images, masks in first]


class Stepper:
    """A network, its optimiser and its batches, for training step by step."""

    def __init__(self, setting: Setting, cell: Cell, batches: list[tuple[Tensor, Tensor]] | None = None):
        """`batches`: by default those of `Setting.batches`. Raises `UnsupportedMethod`."""
        self.cell = cell
        self.network = setting.network(cell)
        self.batches = batches or setting.batches(cell, self.network)
        groups = parameter_groups(self.network, self.network.method.hyperparameters)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
        self.forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self.network
        """images, masks -> loss, logits"""
        self._clock = setting.clock
        self._taken = 0

    def step(self) -> None:
        """Forward, backward and update."""
        images, masks = self.batches[self._taken % len(self.batches)]
        self._taken += 1
        loss, _ = self.forward(images, masks)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self) -> float:
        """Seconds of a step."""
        started = self._clock()
        self.step()
        return self._clock() - started
