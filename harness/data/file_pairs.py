"""Datasets whose pairs are image and mask files: reading, checking and fingerprinting them.

Where the files are and what their labels mean is in the subclasses (`folder`, `mmseg_catalog`).
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image, ImageOps

from harness.data.base import IGNORE_INDEX, SPLITS, Copies, Pair, Sample, SegmentationDataset, Split, WorkingSizes
from harness.errors import UserError
from harness.util.files import digest
from harness.util.json_cache import cached_json

ILLEGAL = -1
"""In a label table: a value that is not allowed in a mask."""


class Files(NamedTuple):
    """The source of a sample."""

    image: Path
    mask: Path


class Checked(NamedTuple):
    """The result of checking one pair."""

    size: tuple[int, int]
    """height, width in pixels"""
    image_sha256: str
    mask_sha256: str
    labels: frozenset[int]
    """The classes in the mask."""


class PairedFiles(SegmentationDataset):
    """Pairs of one 8-bit image file and one single-channel mask file.

    A subclass sets the attributes below and implements `find`.
    """

    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    root: Path
    cache: Path
    label_table: np.ndarray
    """int16 [256]: a mask file's value to a class, `IGNORE_INDEX` or `ILLEGAL`."""

    @abstractmethod
    def find(self, split: Split) -> list[Sample]:
        """The split's samples in any order, with `Files` as source; none for a dev split that it does not have.

        Raises `UserError`, as from `refuse`.
        """

    def samples(self, split: Split) -> Sequence[Sample]:
        return self._splits[split]

    def load(self, sample: Sample) -> Pair:
        image, mask = sample.source
        return Pair(read_image(image.read_bytes()), self._labels(_read_mask(mask.read_bytes())))

    @property
    def digest(self) -> str:
        """See the base class."""
        return self._contents["digest"]

    @property
    def working_sizes(self) -> WorkingSizes:
        return WorkingSizes(*(tuple(size) for size in self._contents["working_sizes"]))

    @property
    def copies(self) -> Sequence[Copies]:
        return [Copies(first, second, images, (a, b)) for first, second, images, (a, b) in self._contents["copies"]]

    @cached_property
    def _contents(self) -> dict[str, Any]:
        """Decodes every file once; later calls only compare the files' sizes and times."""
        samples = [sample for split in SPLITS for sample in self.samples(split)]
        settings = {
            "classes": self.classes,
            "labels": self.label_table.tolist(),
            "scale": self.scale,
            "samples": [[sample.name, sample.group] for sample in samples],
        }
        files = [[self._relative(path), *_size_and_time(path)] for sample in samples for path in sample.source]
        key = {"root": str(self.root.resolve()), "settings": digest(settings), "files": digest(files)}
        return cached_json(self.cache, "dataset-files", key, lambda: self._check(samples, settings))

    def refuse(self, problems: Sequence[str]) -> NoReturn:
        """Raise the first problem as `UserError`, with the number of further ones."""
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}", field="dataset", value=self.name)

    @cached_property
    def _splits(self) -> dict[Split, list[Sample]]:
        return {split: sorted(self.find(split), key=lambda sample: sample.name) for split in SPLITS}

    def _check(self, samples: list[Sample], settings: dict) -> dict[str, Any]:
        self._check_disjoint()
        # Threads: Pillow's decoders and hashlib release the GIL.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            outcomes = list(pool.map(self._check_pair, samples))
        problems = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if problems:
            self.refuse(problems)
        checked = [outcome for outcome in outcomes if isinstance(outcome, Checked)]
        present = frozenset[int]().union(*(found.labels for found in checked[: len(self.samples("train"))]))
        if len(present) < 2:
            # The usual cause is a two-class mask of 0 and 255 where the labels should be 0 and 1.
            only = f"class {min(present)} alone" if present else "ignored pixels alone"
            self.refuse([f"{samples[0].source.mask}: the masks of train hold {only}; labels are class indices"])
        return {
            "digest": digest({**settings, "contents": [[c.image_sha256, c.mask_sha256] for c in checked]}),
            "working_sizes": WorkingSizes.of((c.size for c in checked), self.scale),
            "copies": _copies([sample.name for sample in samples], [c.image_sha256 for c in checked]),
        }

    def _check_disjoint(self) -> None:
        """No image file, links followed, may be in two splits."""
        owner: dict[str, Split] = {}
        problems = []
        for split in SPLITS:
            for sample in self.samples(split):
                other = owner.setdefault(os.path.realpath(sample.source.image), split)
                if other != split:
                    problems.append(f"{sample.source.image}: is in the {split} split and in the {other} split")
        if problems:
            self.refuse(problems)

    def _check_pair(self, sample: Sample) -> Checked | str:
        """The pair's hashes and labels, or the problem with it."""
        contents, arrays = [], []
        for path, read in zip(sample.source, (read_image, _read_mask), strict=True):
            # For a damaged file Pillow raises OSError, SyntaxError, ValueError, struct.error and more.
            try:
                contents.append(path.read_bytes())
                arrays.append(read(contents[-1]))
            except Image.UnidentifiedImageError:
                return f"{path}: not an image file"
            except Exception as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                return f"{path}: {' '.join(reason.split())}"
        image, values = arrays
        mask = sample.source.mask
        if image.shape[:2] != values.shape:
            return f"{mask}: {_size(values)} pixels, but {sample.source.image} has {_size(image)}"
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        labels = self.label_table[present]
        if (labels == ILLEGAL).any():
            value = int(present[labels == ILLEGAL][0])
            row, column = (int(place[0]) for place in np.nonzero(values == value))
            return f"{mask}: label {value} at ({row}, {column}) but {self._known_labels()}"
        image_sha256, mask_sha256 = (hashlib.sha256(content).hexdigest() for content in contents)
        return Checked(values.shape, image_sha256, mask_sha256, frozenset(labels.tolist()) - {IGNORE_INDEX})

    def _labels(self, values: np.ndarray) -> np.ndarray:
        # An illegal value would become 255 here, but `digest` has refused it before training.
        return self.label_table.astype(np.uint8)[values]

    def _known_labels(self) -> str:
        known = np.flatnonzero((self.label_table != ILLEGAL) & (self.label_table != IGNORE_INDEX))
        ignored = " and ".join(str(value) for value in np.flatnonzero(self.label_table == IGNORE_INDEX))
        return f"{len(self.classes)} classes ({known[0]}..{known[-1]}) and {ignored} = ignore"

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def files_below(folder: Path) -> Iterator[Path]:
    """All files under a folder, through links to folders too, in no particular order.

    Hidden files and folders, such as those of file managers and notebooks, are skipped.
    """
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)  # the check will open the file and report what is wrong
    return status.st_size, status.st_mtime_ns


def _copies(names: Sequence[str], hashes: Sequence[str]) -> list[Copies]:
    """Names begin with their split; splits are in the order of `SPLITS`."""
    earliest: dict[str, str] = {}
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, content in zip(names, hashes, strict=True):
        original = earliest.setdefault(content, name)
        splits = original.partition("/")[0], name.partition("/")[0]
        if splits[0] != splits[1]:
            found.setdefault(splits, []).append((original, name))
    return [Copies(*splits, len(pairs), pairs[0]) for splits, pairs in found.items()]


def read_image(content: bytes) -> np.ndarray:
    """uint8 [H, W, 3], RGB. Rotated by the EXIF orientation, as mmcv does."""
    with Image.open(io.BytesIO(content)) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode}: more than 8 bits a channel; convert it to 8-bit RGB")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _read_mask(content: bytes) -> np.ndarray:
    """uint8 [H, W]; of a palette image the indices."""
    with Image.open(io.BytesIO(content)) as mask:
        if mask.mode.startswith(("I", "F")):
            raise ValueError(f"mode {mask.mode}: has more than 8 bits a pixel; save class indices as 8-bit greyscale")
        if mask.mode not in ("L", "P", "1"):
            raise ValueError(f"mode {mask.mode}: a colour mask; save class indices as one 8-bit channel")
        return np.asarray(mask).astype(np.uint8, copy=False)
