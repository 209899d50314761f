"""Datasets by name, what there is to choose from, and how train is divided when a search selects.

Where a dataset's pairs come from is each dataset's own module; opening one does not import torch.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.datasets.base import IGNORE_INDEX, Pair, Sample, SegmentationDataset
from harness.errors import UserError, did_you_mean
from harness.spec import Part

__all__ = [
    "IGNORE_INDEX",
    "DatasetEntry",
    "Pair",
    "Sample",
    "SegmentationDataset",
    "dataset_names",
    "open_dataset",
    "split_samples",
]


@dataclass(frozen=True)
class DatasetEntry:
    """One line of `harness list datasets`."""

    name: str
    kind: Literal["landcover", "folder", "mmsegmentation"]
    location: str
    """Where it is, or is expected."""
    present: bool


def open_dataset(name: str, data: Path, cache: Path) -> SegmentationDataset:
    """The dataset of a name. Opening does not read the pairs; what `digest` finds is remembered in `cache`.

    A name is `landcover`; a path to a YAML file, or to a folder that holds `dataset.yaml`; NAME where `data`
    holds NAME/dataset.yaml or NAME.yaml; or one of mmsegmentation's catalogue, whose files are under `data`.

    Raises `UserError` for an unknown name, a description that does not fit, or files that are not there.
    """
    from harness.datasets import mmsegmentation

    if name == "landcover":
        from harness.datasets.landcover import LandCover

        return LandCover()
    description = _description(name, data)
    if description is not None:
        from harness.datasets.folder import FolderDataset

        return FolderDataset(description, cache)
    if name in mmsegmentation.names() or name in mmsegmentation.ALIASES:
        return mmsegmentation.MMSegmentationDataset(name, data, cache)
    if name in mmsegmentation.EXCLUDED:
        raise UserError(f"--dataset {name}: {mmsegmentation.EXCLUDED[name]}; `harness list datasets` prints the others")
    for folder in (Path(name).expanduser(), data / name):
        if name and folder.is_dir():
            raise UserError(f"--dataset {name}: {folder} holds no dataset.yaml; write one that names the classes")
    known = ["landcover", *mmsegmentation.names(), *_described(data)]
    raise UserError(f"--dataset {name}: no such dataset; {did_you_mean(name, known)} (or name a .yaml file)")


def dataset_names(data: Path) -> list[DatasetEntry]:
    """Every dataset that `open_dataset` knows by name, there or not."""
    from harness.datasets import landcover, mmsegmentation

    try:
        location, present = ", ".join(str(path) for path in landcover.files()), True
    except UserError as error:
        location, present = str(error).rpartition("; ")[2], False
    entries = [DatasetEntry("landcover", "landcover", location, present)]
    entries += [DatasetEntry(name, "folder", str(path), True) for name, path in _described(data).items()]
    for name in mmsegmentation.names():
        location = str(data / mmsegmentation.root_of(name))
        entries.append(DatasetEntry(name, "mmsegmentation", location, mmsegmentation.is_there(name, data)))
    return entries


def split_samples(dataset: SegmentationDataset, part: Part, dev_fraction: float) -> tuple[list[Sample], list[Sample]]:
    """The samples to fit on and those to evaluate on.

    `report`: all of train, all of test. `dev`: train alone; its groups, in the order of their names' SHA-256,
    are held out until at least `dev_fraction` of the samples are, but one group always stays.
    Raises `UserError` for `dev` where train is one group.
    """
    train = list(dataset.samples("train"))
    if part == "report":
        return train, list(dataset.samples("test"))
    sizes = Counter(sample.group for sample in train)
    if len(sizes) < 2:
        raise UserError(
            f"--dataset {dataset.name}: no dev part can be held out of train, "
            f"which is one group ({train[0].group}); name smaller groups"
        )
    held: set[str] = set()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).digest())[:-1]:
        if sum(sizes[other] for other in held) >= dev_fraction * len(train):
            break
        held.add(group)
    return (
        [sample for sample in train if sample.group not in held],
        [sample for sample in train if sample.group in held],
    )


def _description(name: str, data: Path) -> Path | None:
    """The YAML file that a name or path stands for; None where it can only be a name of the catalogue."""
    path = Path(name).expanduser()
    is_yaml = path.suffix in (".yaml", ".yml")
    is_path = is_yaml or "/" in name or os.sep in name
    if path.is_file() and is_yaml:
        return path
    if (path / "dataset.yaml").is_file():
        return path / "dataset.yaml"
    if is_path:
        missing = path if is_yaml else path / "dataset.yaml"
        raise UserError(f"--dataset {name}: no such file: {missing}")
    return _described(data).get(name)


def _described(data: Path) -> dict[str, Path]:
    """The datasets under `data` that have a description, by name; NAME/dataset.yaml goes before NAME.yaml."""
    files = {path.stem: path for path in sorted(data.glob("*.yaml"))}
    folders = {path.parent.name: path for path in sorted(data.glob("*/dataset.yaml"))}
    return dict(sorted({**files, **folders}.items()))
