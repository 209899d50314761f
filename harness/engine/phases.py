"""The results of the phases of a run: prepared, trained, evaluated. See `run.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.data.augmentation import TrainStream
from harness.data.base import Sample
from harness.engine.attempt import RunAttempt
from harness.engine.cost import StepCost
from harness.engine.training import Meters
from harness.features.keys import FeatureCache
from harness.features.pretrained import PretrainedBackbone
from harness.models.network import Segmenter


@dataclass(frozen=True)
class Prepared:
    """A network that is ready for training, with its data."""

    attempt: RunAttempt
    backbone: PretrainedBackbone
    network: Segmenter
    frozen_stages: int
    """Number of first stages of the backbone that the method does not change; 0 in a compiled run: it shares none."""
    train_samples: Sequence[Sample]
    evaluation_samples: Sequence[Sample]
    stream: TrainStream
    cache: FeatureCache
    step_cost: StepCost | None
    """None where it could not be counted."""
    unrepeatable: str | None
    """The kernel of the network's steps that does not repeat to the bit on this device."""


@dataclass(frozen=True)
class Trained:
    """A network that was trained for the whole budget."""

    prepared: Prepared
    meters: Meters
    peak_memory_bytes: int | None
    """During training; None if it could not be measured for this network alone."""


@dataclass(frozen=True)
class Evaluated:
    """The results of the one evaluation at the end."""

    trained: Trained
    confusions: np.ndarray
    """int64 [N, K, K], one matrix per evaluated image, rows labels, columns predictions."""
    cached_share: float
    """Share of the forward passes whose frozen stages were read from the cache."""
