"""The image/label pair, and the interface of every dataset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from harness.errors import UserError

IGNORE_INDEX = 255
"""The label of pixels that are ignored by the loss and by the metrics."""

Split = Literal["train", "dev", "test"]
"""Networks are trained on `train`, hyperparameters are selected on `dev`, and `test` is evaluated once, at the end.
Nothing is ever trained on `dev`. Many datasets have no dev split: then a part of train is held out, see `splits.py`."""
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


class NoData(UserError):
    """The files of a known dataset are not on this machine. The hint says how to get or to find them."""


class Bands(NamedTuple):
    """How the channels of an image become 8-bit RGB, as stated in `dataset.yaml`."""

    range: tuple[float, float] | None = None
    """The values that become 0 and 255; None: the image has 8 bits a channel."""
    bands: tuple[int, ...] | None = None
    """Red, green and blue, or one for grey; counted from 1; None: the image is RGB or grey."""


RGB = Bands()
"""8-bit RGB or grey; nothing is stated."""


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
    """Samples of one group (a video clip, a patient, a scene) resemble each other: whole groups are held out of train
    as dev."""
    source: Any
    """What the dataset's own `load` needs; never part of a fingerprint."""


class Copies(NamedTuple):
    """Image files of one split that are copies of files of an earlier one."""

    first: str
    second: str
    images: int
    """Images of `second`."""
    example: tuple[str, str]
    """Names of a sample of each."""


class WorkingSizes(NamedTuple):
    """The sizes of a dataset's images after they were resized to its `scale`: (height, width) in pixels."""

    median: tuple[int, int]
    largest: tuple[int, int]
    """The largest height and the largest width, possibly of different images."""

    @classmethod
    def of(cls, sizes: Iterable[tuple[int, int]], scale: tuple[int, int] | None) -> WorkingSizes:
        """From the sizes of the image files, at least one."""
        sides = np.array([working_size(size, scale) for size in sizes])
        (height, width), (tallest, widest) = np.sort(sides, axis=0)[len(sides) // 2], sides.max(axis=0)
        return cls((int(height), int(width)), (int(tallest), int(widest)))


def working_size(size: tuple[int, int], scale: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of an image that is resized to fit `scale` at its aspect ratio, as mmcv's `imrescale` does."""
    if scale is None:
        return size
    factor = min(scale[0] / max(size), scale[1] / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


class SegmentationDataset(ABC):
    """Pairs of images and labels in two or three disjoint splits.

    Opening a dataset, `samples`, `digest` and `working_sizes` must not import torch, because planning a study of a
    thousand cells uses them; `classes`, `palette` and `load` may.
    """

    name: str
    description: Path | None = None
    """The file that describes the dataset, which errors name; None if it has none."""
    scale: tuple[int, int] | None = None
    """(long side, short side) in pixels: images are resized to fit, at their aspect ratio, before augmentation and
    evaluation, as by mmsegmentation's `scale` for this benchmark; None: images are not resized."""

    bands: Bands = RGB
    """How the channels of image files become RGB, if they are not."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names; the index is the label."""

    @property
    @abstractmethod
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One RGB colour (0..255) per class."""

    @property
    def codes(self) -> tuple[int, ...] | None:
        """The value of each class in mask files of one channel; None: its index."""
        return None

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hex SHA-256 of everything that can change a result: the pairs' contents, the classes' names, the splits.

        Computing it checks the dataset: sizes, label range, missing pairs, unreadable files.
        Raises `UserError` that names the file and what to do.
        """

    @property
    def test_is_held_out(self) -> bool:
        """Whether test is a part of train's groups, held out because the dataset has no test split of its own."""
        return False

    @property
    def copies(self) -> Sequence[Copies]:
        """Equal image files in two splits: a leak, or blank images. Raises `UserError`, as `digest` does."""
        return ()

    @property
    def oddities(self) -> Sequence[str]:
        """What is odd about the files and may be intended; one line each. Raises `UserError`, as `digest` does."""
        return ()

    def class_pixels(self, split: Split) -> Sequence[int]:
        """The pixels of each class and, last, the ignored ones. Raises `UserError`, as `digest` does."""
        counts = np.zeros(IGNORE_INDEX + 1, np.int64)
        for sample in self.samples(split):
            counts += np.bincount(self.load(sample).mask.ravel(), minlength=IGNORE_INDEX + 1)
        return [*counts[: len(self.classes)].tolist(), int(counts[IGNORE_INDEX])]

    @property
    def thinnest(self) -> tuple[int, str] | None:
        """The shortest side of all images at `scale`, in pixels, and its sample; None if all images have one size."""
        return None

    @property
    @abstractmethod
    def working_sizes(self) -> WorkingSizes:
        """The sizes of all images at `scale`. Raises `UserError`, as `digest` does."""

    @abstractmethod
    def samples(self, split: Split) -> Sequence[Sample]:
        """The split's samples, sorted by name; none for `dev` if the dataset has no dev split of its own."""

    @abstractmethod
    def load(self, sample: Sample) -> Pair:
        """Read one pair at the labels' own size."""
