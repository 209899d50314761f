"""The image/label pair, and the interface of every dataset. Where the pairs come from is each dataset's own module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

IGNORE_INDEX = 255
"""The label of pixels that are ignored by the loss and by the metrics."""

Split = Literal["train", "test"]
"""Methods are trained on `train`; `test` is evaluated once, at the end."""


class Pair(NamedTuple):
    """One image and its labels at one size."""

    image: np.ndarray
    """uint8 [H, W, 3], RGB."""
    mask: np.ndarray
    """uint8 [H, W]; 0 .. classes - 1, or `IGNORE_INDEX`."""


@dataclass(frozen=True)
class Sample:
    """One pair that can be loaded."""

    name: str
    """Unique within the dataset and the same on every machine; the order of samples is the order of names."""
    group: str
    """Samples of one group (a scene, a region) are never divided between training and the dev split."""
    source: Any
    """What the dataset's own `load` needs; never part of a fingerprint."""


class SegmentationDataset(ABC):
    """Pairs of images and labels in two disjoint splits.

    Opening a dataset, `samples` and `digest` must not import torch, because planning a study of a thousand cells uses
    them; `classes`, `palette` and `load` may.
    """

    name: str
    scale: tuple[int, int] | None = None
    """(long side, short side) in pixels: images are resized to fit, with their aspect ratio, before augmentation and
    evaluation, as by mmsegmentation's `scale` of this benchmark; None: images are not resized."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names; the index is the label."""

    @property
    @abstractmethod
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One RGB colour (0..255) per class."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hex SHA-256 of everything that can change a result: the pairs' contents, the classes' names, the splits.

        Computing it checks the dataset: sizes, label range, missing pairs, unreadable files.
        Raises `UserError` that names the file and what to do.
        """

    @abstractmethod
    def samples(self, split: Split) -> Sequence[Sample]:
        """The split's samples, sorted by name."""

    @abstractmethod
    def load(self, sample: Sample) -> Pair:
        """Read one pair at the labels' own size."""
