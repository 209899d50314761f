"""Which of a run's frozen features others can use, and under which name they are kept."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from harness import provenance
from harness.backbones.staged import Prefix, StagedBackbone
from harness.cells import Cell
from harness.features import FeatureStore, FeatureStream
from harness.feeding import names
from harness.runs import RunStore
from harness.spec import PROTOCOL

SHARE = 0.25
"""Of what kept features may take on disk, the most that one run's evaluation adds."""


class Reuse:
    """The kept features that a cell may use: the same bits as if it computed them.

    A name covers all that the bits depend on: the backbone's tensors, the images and what is done to them, the code,
    the packages and the device that compute.
    """

    def __init__(self, cell: Cell, store: RunStore, backbone_sha256: str, fabric: Fabric, limit: int):
        """`limit`: bytes on disk; 0 keeps and finds nothing, as do several processes that share a batch."""
        self.limit = limit if fabric.world_size == 1 else 0
        self._features = FeatureStore(store.cache / "features", self.limit)
        self._budget, self._seed = cell.spec.budget, cell.spec.seed
        seen = {"batch_size", "precision", "channels_last"} | ({"dev_fraction"} if cell.spec.part == "dev" else set())
        self._common: dict[str, Any] = {
            "protocol": PROTOCOL,
            "code": provenance.sources("harness"),
            "packages": provenance.packages(),
            "device": provenance.device_name(fabric.device),
            "threads": torch.get_num_threads() if fabric.device.type == "cpu" else 0,
            "backbone": cell.spec.backbone,
            "backbone_sha256": backbone_sha256,
            "data": cell.spec.data_digest,
            "part": cell.spec.part,
            "budget": self._budget.model_dump(mode="json", include=seen),
        }

    def training(self) -> FeatureStream:
        """Of the passes of training at the cell's seed."""
        seen = {"steps", "accumulate", "crop", "resize", "flip", "photometric"}
        identity = {"use": "training", "seed": self._seed, "of": self._budget.model_dump(mode="json", include=seen)}
        return self._features.stream(self._common | identity, self._budget.steps * self._budget.accumulate)

    def evaluation(self) -> FeatureStream:
        """Of the passes of the cell's evaluation, which no seed enters."""
        seen = {"evaluation", "stride"} | ({"crop"} if self._budget.evaluation == "slide" else set())
        identity = {"use": "evaluation", "of": self._budget.model_dump(mode="json", include=seen)}
        return self._features.stream(self._common | identity, None)


class Remembered:
    """What the untouched stages make of each forward pass's images: read where it is kept, else computed, and kept.

    To be called with the same images in the same order as whoever kept it.
    """

    def __init__(self, backbone: StagedBackbone, stages: int, stream: FeatureStream, limit: int, device: torch.device):
        self._backbone, self._stages, self._stream, self._device = backbone, stages, stream, device
        self._left = int(limit * SHARE)
        self._keeping = self._left > 0
        self.passes = self.reused = 0

    def __call__(self, images: Tensor) -> Prefix:
        prefix, known = self._kept((images.shape[-2], images.shape[-1]))
        self.reused += known == self._stages
        fresh: dict[str, tuple[Tensor, float]] = {}
        for stage in range(known, self._stages):
            began = time.monotonic()
            prefix = self._backbone.prefix(images if prefix is None else prefix, stage + 1)
            fresh[f"stage{stage}"] = (prefix.outputs[stage], time.monotonic() - began)
        assert prefix is not None
        if fresh and self._keeping:
            self._left -= sum(tensor.nbytes for tensor, _ in fresh.values())
            self._keeping = self._left > 0 and self._stream.write(self.passes, fresh)
        self.passes += 1
        return prefix

    def finish(self) -> None:
        """All passes are through."""
        if self._keeping:
            self._stream.finish()
        self._stream.close()

    def _kept(self, size: tuple[int, int]) -> tuple[Prefix | None, int]:
        for stages in range(self._stages, 0, -1):
            wanted = names(stages)[1:]
            if self._stream.has(self.passes, wanted) and (found := self._stream.read(self.passes, wanted)) is not None:
                return Prefix([found[name].tensor.to(self._device) for name in wanted], size), stages
        return None, 0
