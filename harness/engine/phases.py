"""What each phase of a run hands to the next: prepared, trained, evaluated. See `run.py`."""

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
    """A network that can be trained, with its data."""

    attempt: RunAttempt
    backbone: PretrainedBackbone
    network: Segmenter
    frozen_stages: int
    """First stages of the backbone that the method leaves as they are."""
    train_samples: Sequence[Sample]
    evaluation_samples: Sequence[Sample]
    stream: TrainStream
    cache: FeatureCache
    step_cost: StepCost | None
    """None where it could not be counted."""


@dataclass(frozen=True)
class Trained:
    """A network that was trained for the whole budget."""

    prepared: Prepared
    meters: Meters
    peak_memory_bytes: int | None
    """While training; None where it could not be measured for this network alone."""


@dataclass(frozen=True)
class Evaluated:
    """What the one evaluation at the end found."""

    trained: Trained
    confusions: np.ndarray
    """int64 [N, K, K], one matrix an evaluated image, rows labels, columns predictions."""
    cached_share: float
    """Of the forward passes whose frozen stages were read from the cache."""
