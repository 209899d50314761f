"""Which of a run's frozen features other runs can use, and the identity under which they are cached."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric import Fabric

from harness.cells.resolve import Cell
from harness.features.store import FeatureStore, FeatureStream
from harness.models.backbones.tensor_files import ImageNorm
from harness.runs.store import RunStore
from harness.spec import PROTOCOL
from harness.util import provenance


class FeatureCache:
    """The cached features that a cell may use: the same bits as if it computed them.

    The identity covers all that the bits depend on: the backbone's tensors, the images and what is done to them, the
    code, the packages and the device that compute.
    """

    def __init__(self, cell: Cell, store: RunStore, backbone_sha256: str, norm: ImageNorm, fabric: Fabric, limit: int):
        """`norm`: of the images. `limit`: bytes on disk; 0 caches nothing. Processes that share a batch cache nothing
        either."""
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
            "norm": norm,
            "data": cell.spec.data_digest,
            "part": cell.spec.part,
            "budget": self._budget.model_dump(mode="json", include=seen),
        }

    def training(self) -> FeatureStream:
        """Features of the training passes at the cell's seed."""
        seen = {"steps", "accumulate", "crop", "resize", "flip", "photometric", "train_fraction"}
        identity = {"use": "training", "seed": self._seed, "of": self._budget.model_dump(mode="json", include=seen)}
        return self._features.stream(self._common | identity, self._budget.steps * self._budget.accumulate)

    def evaluation(self) -> FeatureStream:
        """Features of the evaluation passes, which do not depend on the seed."""
        seen = {"evaluation", "stride"} | ({"crop"} if self._budget.evaluation == "slide" else set())
        identity = {"use": "evaluation", "of": self._budget.model_dump(mode="json", include=seen)}
        return self._features.stream(self._common | identity, None)
