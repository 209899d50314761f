"""mmsegmentation's benchmarks by name, laid out under the data folder as its documentation describes.

They are described in `mmseg_catalog.yaml`; this module opens them. mmseg itself is not imported.

Of them, only REFUGE has three official splits with public labels. The others have two, or the labels of their third
are not public (ADE20K, BDD100K, Cityscapes, COCO-Stuff 164k, iSAID, LoveDA, Mapillary, Pascal VOC): as in
mmsegmentation's configs, their `test` is the validation split, and dev is held out of train.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from harness.data.base import IGNORE_INDEX, SPLITS, NoData, Sample, Split
from harness.data.file_pairs import Files, PairedFiles, files_below
from harness.data.masks import ILLEGAL, Colour, LabelRules
from harness.util.files import read_yaml


class _CatalogModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_CatalogModel):
    """One folder of images with its folder of masks, relative to the dataset's root."""

    images: Path
    masks: Path
    names: Path | None = None
    """File that lists the images, one per line, without suffix; None: all images of the folder."""


class Entry(_CatalogModel):
    """A benchmark as `mmseg_catalog.yaml` describes it."""

    root: Path
    train: tuple[Source, ...]
    dev: tuple[Source, ...] = ()
    test: tuple[Source, ...]
    image_suffix: str
    mask_suffix: str
    reduce_zero_label: bool = False
    scale: tuple[int, int]
    group: re.Pattern[str] = re.compile("(.+)/")
    ignored: tuple[str, ...] = ()
    classes: dict[str, Colour]

    def sources(self, split: Split) -> tuple[Source, ...]:
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]


class MMSegmentationDataset(PairedFiles):
    """A dataset of the catalog. Raises `NoData` where its files are not under `data`."""

    def __init__(self, name: str, data: Path, cache: Path) -> None:
        self.name = _catalog()["aliases"].get(name, name)
        self.cache = cache
        self._entry = found = entry(name)
        self.root = data / found.root
        colours = {name: colour for name, colour in found.classes.items() if name not in found.ignored}
        self.classes = tuple(colours)
        self.palette = tuple(colours.values())
        self.rules = LabelRules(label_table(tuple(found.classes), self.classes, found.reduce_zero_label))
        self.scale = found.scale
        if not is_present(name, data):
            expected = " and ".join(
                f"{self.root / source.images}/**/*{found.image_suffix} "
                f"with {self.root / source.masks}/**/*{found.mask_suffix}"
                f"{f' listed in {self.root / source.names}' if source.names else ''} ({split})"
                for split in SPLITS
                for source in found.sources(split)
            )
            problem = f"not found under {data}; expected {expected}"
            raise NoData(problem, field="dataset", value=self.name, hint="set --data or HARNESS_DATA")

    def find(self, split: Split) -> list[Sample]:
        image_suffix, mask_suffix = self._entry.image_suffix, self._entry.mask_suffix
        found: dict[str, Sample] = {}
        sources = self._entry.sources(split)
        for source in sources:
            images, masks = self.root / source.images, self.root / source.masks
            for stem in self._stems(source, images):
                name = f"{split}/{stem}"
                if name in found:
                    self.refuse([f"{images / stem}{image_suffix}: is in the {split} split twice"])
                match = self._entry.group.search(stem)
                files = Files(images / f"{stem}{image_suffix}", masks / f"{stem}{mask_suffix}")
                found[name] = Sample(name, match[1] if match else name, files)
        if sources and not found:
            self.refuse([f"{images}: no *{image_suffix}; the {split} split is empty"])
        return list(found.values())

    def _stems(self, source: Source, images: Path) -> Iterator[str]:
        if source.names:
            lines = (self.root / source.names).read_text(encoding="utf-8").splitlines()
            yield from filter(None, map(str.strip, lines))
        else:
            suffix = self._entry.image_suffix
            for path in files_below(images):
                if path.name.endswith(suffix):
                    yield path.relative_to(images).as_posix().removesuffix(suffix)


def names() -> list[str]:
    """The catalog's names, sorted, without aliases."""
    return sorted(_catalog()["datasets"])


def excluded() -> dict[str, str]:
    """Datasets of mmsegmentation that are not in the catalog, with the reason."""
    return _catalog()["excluded"]


def is_name(name: str) -> bool:
    """Whether a name, or an alias, is in the catalog."""
    return name in _catalog()["datasets"] or name in _catalog()["aliases"]


@cache
def entry(name: str) -> Entry:
    """The description of a dataset, by its name or an alias. Raises `KeyError` for another name."""
    return Entry.model_validate(_catalog()["datasets"][_catalog()["aliases"].get(name, name)])


def is_present(name: str, data: Path) -> bool:
    """Whether all folders and lists of names of the dataset are under `data`."""
    found = entry(name)
    sources = (source for split in SPLITS for source in found.sources(split))
    paths = [path for source in sources for path in (source.images, source.masks, source.names)]
    return all((data / found.root / path).exists() for path in paths if path)


def label_table(in_masks: tuple[str, ...], classes: tuple[str, ...], reduce_zero_label: bool) -> np.ndarray:
    """int16 [256]: a mask file's value to a label, as mmseg's `LoadAnnotations` maps it.

    `in_masks` are the classes that the files hold; those that are not in `classes` are ignored. With
    `reduce_zero_label` the files' 0 is ignored and their classes begin at 1. mmseg accepts values beyond the classes;
    here they are illegal.
    """
    table = np.full(256, ILLEGAL, np.int16)
    first = 1 if reduce_zero_label else 0
    for value, name in enumerate(in_masks, start=first):
        table[value] = classes.index(name) if name in classes else IGNORE_INDEX
    table[:first] = IGNORE_INDEX
    table[IGNORE_INDEX] = IGNORE_INDEX
    return table


@cache
def _catalog() -> dict[str, Any]:
    text = resources.files("harness.data").joinpath("mmseg_catalog.yaml").read_text(encoding="utf-8")
    return read_yaml(text)
