"""What an image/label pair is, and what every dataset answers; where the pairs come from is each dataset's own file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

IGNORE_INDEX = 255
"""The label of pixels that neither train nor count."""

Split = Literal["train", "test"]
"""`train` is what methods may learn from; `test` is the reported part, evaluated once, at the end."""


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
    """Samples of one group (one scene, one region) are never parted between training and the dev part."""
    source: Any
    """Whatever the dataset's own `load` needs; never part of a fingerprint."""


class SegmentationDataset(ABC):
    """Pairs of images and labels, in two splits that never mix.

    Opening a dataset, listing its samples and asking for its digest must not import torch (a study of a
    thousand cells is planned with them); `classes`, `palette` and `load` may.
    """

    name: str
    scale: tuple[int, int] | None = None
    """(long side, short side) in pixels that images are shrunk or enlarged to fit, aspect kept, before augmentation
    and before evaluation, as mmsegmentation's `scale` of this benchmark; None leaves them at their own size."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names; the index is the label."""

    @property
    @abstractmethod
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One RGB colour (0..255) a class."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hex SHA-256 of everything that can change a result: the pairs' contents, the classes' names, the splits.

        Asking for it checks the dataset: sizes, label range, missing pairs, unreadable files.
        Raises `UserError` that names the file and the remedy.
        """

    @abstractmethod
    def samples(self, split: Split) -> Sequence[Sample]:
        """The split's samples, sorted by name."""

    @abstractmethod
    def load(self, sample: Sample) -> Pair:
        """Read one pair at the labels' own size."""
