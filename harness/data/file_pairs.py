"""Datasets whose pairs are image and mask files: reading, checking and fingerprinting them.

Where the files are and what their labels mean is in the subclasses (`folder`, `mmseg_catalog`).
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import UnidentifiedImageError

from harness.data.base import (
    IGNORE_INDEX,
    RGB,
    SPLITS,
    Copies,
    Pair,
    Sample,
    SegmentationDataset,
    Split,
    WorkingSizes,
    working_size,
)
from harness.data.contents import Checked, Contents, hint_of_values
from harness.data.images import is_deep, orientation, read_image
from harness.data.masks import ILLEGAL, LabelRules, MaskFile
from harness.errors import UserError
from harness.util.files import digest
from harness.util.json_cache import cached_json
from harness.util.text import list_some

_READER = 3
"""Part of the cache's key: raise it when the check records something else."""


class Files(NamedTuple):
    """The source of a sample."""

    image: Path
    mask: Path
    annotations: bytes = b""
    """If `mask` is a COCO file: this image's objects, from `coco.Annotations.mask`; empty if `mask` is a mask."""

    def mask_content(self) -> bytes:
        """The bytes that `read_mask` reads."""
        return self.annotations or self.mask.read_bytes()


class Problem(NamedTuple):
    """Why a pair cannot be used."""

    text: str
    values: frozenset[int] = frozenset()
    """Those in the mask, if some are not declared."""


class PairedFiles(SegmentationDataset):
    """Pairs of one image file and one mask file.

    A subclass sets the attributes below and implements `find`.
    """

    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    root: Path
    cache: Path
    rules: LabelRules
    """What the pixels of masks mean."""
    states_255: bool = True
    """Whether it is known that 255 in masks is ignored, or that it is a class."""
    states_values: bool = True
    """Whether it is known which values of masks the classes have."""

    @abstractmethod
    def find(self, split: Split) -> list[Sample]:
        """The split's samples in any order, with `Files` as source; none for a dev split that it does not have.

        Raises `UserError`, as `refuse` does.
        """

    def samples(self, split: Split) -> Sequence[Sample]:
        return self._splits[split]

    def load(self, sample: Sample) -> Pair:
        files: Files = sample.source
        labels = self.rules.labels(self.rules.read(files.mask_content()))
        # An illegal value would become 255 here, but `digest` has refused it before training.
        return Pair(read_image(files.image.read_bytes(), self.bands), labels.astype(np.uint8))

    @property
    def codes(self) -> tuple[int, ...] | None:
        """See the base class."""
        return self.rules.codes(len(self.classes))

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

    @property
    def thinnest(self) -> tuple[int, str]:
        side, name = self._contents["thinnest"]
        return side, name

    @property
    def oddities(self) -> Sequence[str]:
        return self._contents["warnings"]

    def class_pixels(self, split: Split) -> Sequence[int]:
        return self._contents["pixels"].get(split, [0] * (len(self.classes) + 1))

    @cached_property
    def _contents(self) -> dict[str, Any]:
        """Decodes every file once; later calls only compare the files' sizes and times."""
        samples = [sample for split in SPLITS for sample in self.samples(split)]
        rules = self.rules
        settings: dict[str, Any] = {
            "classes": self.classes,
            "labels": rules.table.tolist(),
            "scale": self.scale,
            "samples": [[sample.name, sample.group] for sample in samples],
        }
        # Fields added later enter only where they are set, so that other datasets keep their digest.
        settings |= {"wide_labels": sorted(rules.wide.items())} if rules.wide else {}
        settings |= {"bands": self.bands} if self.bands != RGB else {}
        colours = sorted([*colour, label] for colour, label in rules.colours.items())
        sources: list[Files] = [sample.source for sample in samples]
        files = [[self._relative(path), *_size_and_time(path)] for source in sources for path in source[:2]]
        annotations = [hashlib.sha256(source.annotations).hexdigest() for source in sources if source.annotations]
        key = {
            "root": str(self.root.resolve()),
            "settings": digest(settings),
            "files": digest([*files, *annotations]),
            "reader": [_READER, colours, self.states_255, self.states_values],
        }
        return cached_json(self.cache, "dataset-files", key, lambda: self._check(samples, settings, colours))

    def refuse(self, problems: Sequence[str], hint: str | None = None) -> NoReturn:
        """Raise the first problem as `UserError`, with the number of further ones."""
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}", field="dataset", value=self.name, hint=hint)

    @cached_property
    def _splits(self) -> dict[Split, list[Sample]]:
        return {split: sorted(self.find(split), key=lambda sample: sample.name) for split in SPLITS}

    def _check(self, samples: list[Sample], settings: dict, colours: list[list[int]]) -> dict[str, Any]:
        self._check_disjoint()
        # Threads: Pillow's decoders and hashlib release the GIL.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            outcomes = list(pool.map(self._check_pair, samples))
        problems = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
        if problems:
            hint = None
            if undeclared := sum(bool(problem.values) for problem in problems):
                hint = hint_of_values(self.classes, self.rules.table, [outcome.values for outcome in outcomes])
                hint = f"such labels are in {undeclared} of {len(samples)} masks{f'; {hint}' if hint else ''}"
            self.refuse([problem.text for problem in problems], hint)
        checked = [outcome for outcome in outcomes if isinstance(outcome, Checked)]
        contents = Contents(self.classes, self.rules, self.states_255, self.states_values, checked)
        if refusal := contents.refusal():
            files: Files = next(sample.source for sample in samples if sample.name == refusal.sample)
            self.refuse([f"{getattr(files, refusal.file)}: {refusal.reason}"], refusal.hint)
        # Colours that only repeat the order of the labels do not enter the digest.
        read_by = {"colours": colours} if any(found.by_colour for found in checked) else {}
        return {
            "digest": digest(
                {**settings, **read_by, "contents": [[c.image_sha256, c.mask_sha256] for c in checked]},
            ),
            "working_sizes": WorkingSizes.of((c.size for c in checked), self.scale),
            "thinnest": min((min(working_size(c.size, self.scale)), c.name) for c in checked),
            "copies": _copies([sample.name for sample in samples], [c.image_sha256 for c in checked]),
            "pixels": {split: pixels.tolist() for split, pixels in contents.pixels.items()},
            "warnings": contents.warnings(),
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

    def _check_pair(self, sample: Sample) -> Checked | Problem:
        """What the pair holds, or the problem with it."""
        files: Files = sample.source
        path = files.image
        # For a damaged file Pillow raises OSError, SyntaxError, ValueError, struct.error and more.
        try:
            content = path.read_bytes()
            image = read_image(content, self.bands)
            path = files.mask
            mask_content = files.mask_content()
            mask = self.rules.read(mask_content)
            labels = self.rules.labels(mask)
        except UnidentifiedImageError:
            return Problem(f"{path}: not an image file")
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return Problem(f"{path}: {' '.join(reason.split())}")
        turned = orientation(content)
        if image.shape[:2] != labels.shape:
            problem = f"{path}: {_size(labels)} pixels, but {files.image} has {_size(image)}"
            if turned > 4 and image.shape[1::-1] == labels.shape:
                problem += f" after its EXIF orientation, {turned}; turn the mask too, or remove the orientation"
            return Problem(problem)
        illegal = labels == ILLEGAL
        if illegal.any():
            row, column = (int(place[0]) for place in np.nonzero(illegal))
            return self._undeclared(path, mask, row, column)
        counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)
        return Checked(
            sample.name,
            labels.shape,
            hashlib.sha256(content).hexdigest(),
            hashlib.sha256(mask_content).hexdigest(),
            np.append(counts[: len(self.classes)], counts[IGNORE_INDEX]),
            mask.values,
            mask.used_palette,
            self.rules.by_colour(mask),
            1 if turned == orientation(mask_content) else turned,
            int(image.max()) if self.bands == RGB and is_deep(content) else None,
            None if self.bands.range is None else float(((image == 0) | (image == 255)).mean()),
            bool((image == image[0, 0, 0]).all()),
        )

    def _undeclared(self, path: Path, mask: MaskFile, row: int, column: int) -> Problem:
        """The problem with a pixel of a mask."""
        value = mask.pixels[row, column]
        if mask.pixels.ndim == 3:
            colour = value.tolist()
            grey = (mask.pixels == mask.pixels[..., :1]).all()
            hint = "remove the colours from dataset.yaml to read grey masks as class indices" if grey else None
            hint = hint or f"`ignore: [{colour}]` ignores it"
            return Problem(f"{path}: the colour {colour} at ({row}, {column}) is of no class; {hint}")
        return Problem(f"{path}: label {value} at ({row}, {column}) but {self._known_labels()}", mask.values)

    def _known_labels(self) -> str:
        labels = {value: int(label) for value, label in enumerate(self.rules.table)} | dict(self.rules.wide)
        ignored = sorted(value for value, label in labels.items() if label == IGNORE_INDEX)
        known = sorted(value for value, label in labels.items() if label not in (ILLEGAL, IGNORE_INDEX))
        rising = known == list(range(known[0], known[-1] + 1))
        shown = f"{known[0]}..{known[-1]}" if rising else list_some([str(value) for value in known], 12)
        end = f" and {' and '.join(map(str, ignored))} = ignore" if ignored else ""
        return f"{len(self.classes)} classes ({shown}){end}"

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.as_posix()


def files_below(folder: Path) -> Iterator[Path]:
    """All files under a folder, through links to folders too, in no particular order.

    Skips hidden files and folders, such as those of file managers and notebooks, and what is not a file: opening a
    pipe would block for ever.
    """
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(place, name)
            if not name.startswith(".") and (path.is_file() or not path.exists()):
                yield path


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
