"""mmsegmentation's benchmarks by name, laid out under the data folder as its documentation describes.

Everything is derived from the configs and dataset classes of the installed package: folders, suffixes,
splits, scale, classes, label conventions. They are read without importing mmseg, which would import torch.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.data.base import IGNORE_INDEX, Sample, Split
from harness.data.file_pairs import ILLEGAL, Files, PairedFiles, files_below
from harness.errors import UserError

EXCLUDED = {
    "hsi_drive": "hyperspectral cubes, which an RGB backbone cannot read",
    "levir": "change detection between two images",
    "nyu": "depth estimation, not segmentation",
}
ALIASES = {"coco_stuff": "coco_stuff164k"}

GROUPS = {
    "isaid": r"^(P\d+)_",
    "potsdam": r"^(\d+_\d+)_",
    "synapse": r"^(case\d+)_",
    "vaihingen": r"^(area\d+)_",
}
"""What its converters call the patches of one scene, which overlap, or the slices of one patient."""


class Source(NamedTuple):
    """One folder of images and its masks; both, and the list of names, relative to the data folder."""

    images: Path
    masks: Path
    names: Path | None


class MMSegmentationDataset(PairedFiles):
    """A dataset of the catalogue. Raises `UserError` where its files are not under `data`."""

    def __init__(self, name: str, data: Path, cache: Path) -> None:
        self.name = name = ALIASES.get(name, name)
        self.cache = cache
        self.root = data / root_of(name)
        self._data = data
        self._sources = {"train": _sources(name, "train"), "test": _sources(name, "val")}
        config = _datasets(name, "val")[0]
        facts = {**_class_facts(config["type"]), **config}
        self._suffixes = (facts["img_suffix"], facts["seg_map_suffix"])
        named = facts["METAINFO"]["classes"]
        metainfo = {**facts["METAINFO"], **facts.get("metainfo", {})}
        self.classes = tuple(metainfo["classes"])
        self.palette = tuple(tuple(colour) for colour in metainfo["palette"])
        self.label_table = label_table(named, self.classes, facts["reduce_zero_label"])
        self.scale = _scale(config)
        self._group = re.compile(GROUPS.get(name, "(.+)/"))  # A folder below the split's is a scene, such as a city.
        if not self.is_there():
            expected = " and ".join(
                f"{data / source.images}/**/*{self._suffixes[0]} "
                f"with {data / source.masks}/**/*{self._suffixes[1]}"
                f"{f' listed in {data / source.names}' if source.names else ''} ({split})"
                for split, sources in self._sources.items()
                for source in sources
            )
            raise UserError(
                f"--dataset {name}: not found under {data}; expected {expected}; set --data or HARNESS_DATA"
            )

    def is_there(self) -> bool:
        return is_there(self.name, self._data)

    def find(self, split: Split) -> list[Sample]:
        image_suffix, mask_suffix = self._suffixes
        found: dict[str, Sample] = {}
        for source in self._sources[split]:
            images, masks = self._data / source.images, self._data / source.masks
            for stem in self._stems(source, images):
                name = f"{split}/{stem}"
                if name in found:
                    self.refuse([f"{images / stem}{image_suffix}: is in the {split} split twice"])
                match = self._group.search(stem)
                files = Files(images / f"{stem}{image_suffix}", masks / f"{stem}{mask_suffix}")
                found[name] = Sample(name, match[1] if match else name, files)
        if not found:
            self.refuse([f"{images}: no *{image_suffix}; the {split} split is empty"])
        return list(found.values())

    def _stems(self, source: Source, images: Path) -> Iterator[str]:
        if source.names:
            lines = (self._data / source.names).read_text(encoding="utf-8").splitlines()
            yield from filter(None, map(str.strip, lines))
        else:
            suffix = self._suffixes[0]
            for path in files_below(images):
                if path.name.endswith(suffix):
                    yield path.relative_to(images).as_posix().removesuffix(suffix)


def names() -> list[str]:
    """The catalogue, sorted."""
    return sorted(_config_files())


def root_of(name: str) -> Path:
    """Where a dataset of the catalogue lies, relative to the data folder."""
    return _below_data(_datasets(ALIASES.get(name, name), "val")[0]["data_root"])


def is_there(name: str, data: Path) -> bool:
    """Whether all folders and lists of names of the dataset are under `data`."""
    sources = [*_sources(name, "train"), *_sources(name, "val")]
    return all((data / path).exists() for source in sources for path in source if path)


def label_table(named: tuple[str, ...], classes: tuple[str, ...], reduce_zero_label: bool) -> np.ndarray:
    """int16 [256]: a mask file's value to a label, as mmseg's `LoadAnnotations` maps it.

    `named` are the classes the files hold, `classes` those that are kept; with `reduce_zero_label` the files'
    0 is ignored and their classes begin at 1. mmseg lets values beyond them pass; here they are illegal.
    """
    table = np.full(256, ILLEGAL, np.int16)
    first = 1 if reduce_zero_label else 0
    kept = range(len(named)) if named == classes else [classes.index(n) if n in classes else None for n in named]
    for value, label in enumerate(kept, start=first):
        table[value] = IGNORE_INDEX if label is None else label
    table[:first] = IGNORE_INDEX
    table[IGNORE_INDEX] = IGNORE_INDEX
    return table


@cache
def _package() -> Path:
    spec = importlib.util.find_spec("mmseg")
    if spec is None or spec.origin is None:
        raise UserError("mmsegmentation is not installed; pip install onedl-mmsegmentation")
    return Path(spec.origin).parent


@cache
def _config_files() -> dict[str, Path]:
    folder = _package() / ".mim" / "configs" / "_base_" / "datasets"
    named = {path.stem.replace("-", "_"): path for path in folder.glob("*.py")}
    # `cityscapes_769x769` is a crop size, not another dataset.
    plain = {name: path for name, path in named.items() if not re.search(r"_\d+x\d+$", name)}
    return {name: path for name, path in plain.items() if name not in EXCLUDED}


@cache
def _datasets(name: str, part: str) -> list[dict[str, Any]]:
    """The dataset configs of `train` or `val`, out of their `RepeatDataset` and `ConcatDataset`."""
    from mmengine.config import Config

    def unwrap(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if config["type"] == "RepeatDataset":
            yield from unwrap(config["dataset"])
        elif config["type"] == "ConcatDataset":
            for member in config["datasets"]:
                yield from unwrap(member)
        else:
            yield config

    loaded = Config.fromfile(_config_files()[name]).to_dict()
    return list(unwrap(loaded[f"{part}_dataloader"]["dataset"]))


def _sources(name: str, part: str) -> list[Source]:
    sources = []
    for config in _datasets(name, part):
        root, prefix = _below_data(config["data_root"]), config["data_prefix"]
        names = root / config["ann_file"] if config.get("ann_file") else None
        sources.append(Source(root / prefix["img_path"], root / prefix["seg_map_path"], names))
    return sources


def _below_data(data_root: str) -> Path:
    return Path(data_root).relative_to("data")


def _scale(config: dict[str, Any]) -> tuple[int, int] | None:
    for step in config["pipeline"]:
        if step["type"] == "Resize":
            return max(step["scale"]), min(step["scale"])
    return None


@cache
def _class_facts(name: str) -> dict[str, Any]:
    """METAINFO, suffixes and `reduce_zero_label` of a dataset class of mmseg, read from its source.

    Defaults of `__init__`, overridden by constants that it passes to `super().__init__`; bases first.
    """
    node = _class_nodes().get(name)
    if node is None:
        return {}
    facts: dict[str, Any] = {}
    for base in node.bases:
        facts |= _class_facts(ast.unparse(base))
    for statement in node.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "METAINFO":
            assert isinstance(statement.value, ast.Call)
            facts["METAINFO"] = _constants((word.arg, word.value) for word in statement.value.keywords)
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            arguments = statement.args.args
            defaults = statement.args.defaults
            with_default = arguments[len(arguments) - len(defaults) :]
            pairs = [(argument.arg, value) for argument, value in zip(with_default, defaults, strict=True)]
            for call in ast.walk(statement):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
                    pairs += [(word.arg, word.value) for word in call.keywords]
            wanted = ("img_suffix", "seg_map_suffix", "reduce_zero_label")
            facts |= _constants((key, value) for key, value in pairs if key in wanted)
    return facts


@cache
def _class_nodes() -> dict[str, ast.ClassDef]:
    nodes = {}
    for path in (_package() / "datasets").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                nodes[node.name] = node
    return nodes


def _constants(pairs: Any) -> dict[str, Any]:
    """The pairs whose value is a literal, as values."""
    constants = {}
    for key, node in pairs:
        try:
            constants[key] = ast.literal_eval(node)
        except ValueError:
            continue  # Such as `img_suffix=img_suffix`: the default stands.
    return constants
