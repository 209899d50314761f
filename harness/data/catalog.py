"""Opens and lists datasets by name. Does not import torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.data import landcover, mmseg_catalog
from harness.data.base import SegmentationDataset
from harness.data.folder import FolderDataset
from harness.errors import UserError, did_you_mean

DESCRIPTION = "dataset.yaml"
"""The file that describes the dataset of its folder."""


@dataclass(frozen=True)
class DatasetEntry:
    """One line of `harness list datasets`."""

    name: str
    kind: Literal["landcover", "folder", "mmsegmentation"]
    location: str
    """Where it is, or is expected."""
    present: bool


def open_dataset(name: str, data: Path, cache: Path) -> SegmentationDataset:
    """Open a dataset by name. This does not read the pairs yet; the result of `digest` is cached in `cache`.

    A name is `landcover`; a path to a YAML file, or to a folder that holds `dataset.yaml`; NAME where `data`
    holds NAME/dataset.yaml or NAME.yaml; or one of mmsegmentation's catalog, whose files are under `data`.

    Raises `UserError` for an unknown name, an invalid description, or missing files.
    """
    description = check_dataset(name, data)
    if description is not None:
        return FolderDataset(description, cache)
    if name == landcover.NAME:
        return landcover.LandCover()
    return mmseg_catalog.MMSegmentationDataset(name, data, cache)


def check_dataset(name: str, data: Path) -> Path | None:
    """The YAML file that describes the dataset; None for one that needs none. Its images are not checked.

    Raises `UserError` of the field `dataset` for an unknown name.
    """

    def error(problem: str, hint: str | None = None) -> UserError:
        return UserError(problem, field="dataset", value=name, hint=hint)

    if name == landcover.NAME:
        return None
    path = Path(os.path.expanduser(name))  # an unknown user is not an error yet
    is_yaml = path.suffix in (".yaml", ".yml")
    if is_yaml and os.path.isfile(path):  # False for a name that no file can have
        return path
    if os.path.isfile(path / DESCRIPTION):
        return path / DESCRIPTION
    if is_yaml or "/" in name or os.sep in name:
        hint = f"`harness new-dataset {path}` writes one" if os.path.isdir(path) else None
        raise error(f"no such file: {path if is_yaml else path / DESCRIPTION}", hint)
    described = _described(data)
    if name in described:
        return described[name]
    if mmseg_catalog.is_name(name):
        return None
    if name in mmseg_catalog.excluded():
        raise error(mmseg_catalog.excluded()[name], "`harness list datasets` prints the others")
    for folder in (path, data / name):
        if name and os.path.isdir(folder):
            raise error(f"{folder} holds no dataset.yaml", f"`harness new-dataset {folder}` writes one")
    known = [landcover.NAME, *mmseg_catalog.names(), *described]
    raise error("no such dataset", f"{did_you_mean(name, known)} (or name a .yaml file)")


def dataset_names(data: Path) -> list[DatasetEntry]:
    """Every dataset that `open_dataset` knows by name, present or not."""
    try:
        location, present = ", ".join(str(path) for path in landcover.files()), True
    except UserError as error:
        location, present = str(error.hint), False
    entries = [DatasetEntry(landcover.NAME, "landcover", location, present)]
    entries += [DatasetEntry(name, "folder", str(path), True) for name, path in _described(data).items()]
    for name in mmseg_catalog.names():
        location = str(data / mmseg_catalog.entry(name).root)
        entries.append(DatasetEntry(name, "mmsegmentation", location, mmseg_catalog.is_present(name, data)))
    return entries


def _described(data: Path) -> dict[str, Path]:
    """The datasets under `data` that have a description, by name; NAME/dataset.yaml takes precedence over NAME.yaml."""
    files = {path.stem: path for path in sorted(data.glob("*.yaml"))}
    folders = {path.parent.name: path for path in sorted(data.glob("*/dataset.yaml"))}
    return dict(sorted({**files, **folders}.items()))
