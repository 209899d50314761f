"""Datasets by name, what there is to choose from, and how train is divided when a search selects.

Where a dataset's pairs come from is each dataset's own module; opening one does not import torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.data.base import SegmentationDataset
from harness.errors import UserError, did_you_mean


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
    from harness.data import mmseg_catalog

    if name == "landcover":
        from harness.data.landcover import LandCover

        return LandCover()
    description = _description(name, data)
    if description is not None:
        from harness.data.folder import FolderDataset

        return FolderDataset(description, cache)
    if name in mmseg_catalog.names() or name in mmseg_catalog.ALIASES:
        return mmseg_catalog.MMSegmentationDataset(name, data, cache)
    if name in mmseg_catalog.EXCLUDED:
        raise UserError(f"--dataset {name}: {mmseg_catalog.EXCLUDED[name]}; `harness list datasets` prints the others")
    for folder in (Path(name).expanduser(), data / name):
        if name and folder.is_dir():
            raise UserError(f"--dataset {name}: {folder} holds no dataset.yaml; write one that names the classes")
    known = ["landcover", *mmseg_catalog.names(), *_described(data)]
    raise UserError(f"--dataset {name}: no such dataset; {did_you_mean(name, known)} (or name a .yaml file)")


def dataset_names(data: Path) -> list[DatasetEntry]:
    """Every dataset that `open_dataset` knows by name, there or not."""
    from harness.data import landcover, mmseg_catalog

    try:
        location, present = ", ".join(str(path) for path in landcover.files()), True
    except UserError as error:
        location, present = str(error).rpartition("; ")[2], False
    entries = [DatasetEntry("landcover", "landcover", location, present)]
    entries += [DatasetEntry(name, "folder", str(path), True) for name, path in _described(data).items()]
    for name in mmseg_catalog.names():
        location = str(data / mmseg_catalog.root_of(name))
        entries.append(DatasetEntry(name, "mmsegmentation", location, mmseg_catalog.is_there(name, data)))
    return entries


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
