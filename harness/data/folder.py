r"""A user's own dataset: a folder of images and masks, described by a small YAML file.

images/<split>/**.jpg|.jpeg|.png|.tif|.tiff|.bmp|.webp
masks/<split>/**.png|.tif|.tiff        same relative name; one 8-bit channel, or a palette image's indices

`splits: {train, dev, test}` names the folders. Where there is no dev split, a part of train is held out as dev, by
`group`, so that images that resemble each other are not divided. `group` is a regular expression on an image's name,
which is its path below the split's folder without the suffix; what the parentheses match is the group:

    clip1_000240.jpg      '^(.+)_\d+$'         clip1: the frames of a video
    clip1/000240.jpg      '^(.+)/'             clip1: a folder for each
    patient_03_L.png      '^(patient_\d+)_'    patient_03: both eyes of a patient
    scene12_r3_c4.png     '^(scene\d+)_'       scene12: the tiles of an image
    0016E5_07959.jpg      '^(\w+)\d{3}$'      0016E5_07: a thousand frames of a long video, to have more groups
"""

from __future__ import annotations

import colorsys
import os
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.data.base import IGNORE_INDEX, Sample, Split
from harness.data.file_pairs import ILLEGAL, Files, PairedFiles, files_below
from harness.errors import InvalidField, UserError, invalid, located
from harness.util.files import read_yaml_file

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"})
MASKS = frozenset({".png", ".tif", ".tiff"})

Byte = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Byte, Byte, Byte]


class Splits(BaseModel):
    """Which subfolder of `images` and `masks` is which split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str = "train"
    dev: str | None = Field(
        None, description="default: `val` if it and `test` exist and no `test` is named; else dev is held out of train"
    )
    test: str | None = Field(None, description="default: `test` if it exists, else `val`")

    @field_validator("train", "dev", "test")
    @classmethod
    def _check_relative(cls, folder: str | None) -> str | None:
        if folder is not None and Path(folder).is_absolute():
            raise ValueError("use the name of a folder below `images` and `masks`")
        return folder

    def folders(self, images: Path) -> dict[Split, str]:
        """The folder of each split that there is. Raises `UserError` if two splits have one folder."""
        has_test, has_val = (images / "test").is_dir(), (images / "val").is_dir()
        dev = self.dev or ("val" if has_test and has_val and self.test is None else None)
        test = self.test or ("test" if has_test or dev == "val" else "val")
        folders: dict[Split, str] = {"train": self.train, **({"dev": dev} if dev else {}), "test": test}
        owner: dict[str, Split] = {}
        for split, folder in folders.items():
            other = owner.setdefault(os.path.normpath(folder), split)
            if other != split:
                problem = f"is the folder of the {other} split too"
                raise UserError(problem, field=f"splits.{split}", value=folder, hint="splits must not overlap")
        return folders


class Description(BaseModel):
    """The fields of the YAML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(None, description="default: the file's name, or the folder's for `dataset.yaml`")
    root: str = Field(".", description="folder of `images` and `masks`, relative to the YAML file")
    classes: tuple[str, ...] = Field(
        min_length=2,
        max_length=IGNORE_INDEX,
        description="names in order of labels, or a mapping name: [r, g, b]",
    )
    palette: tuple[Colour, ...] | None = Field(None, description="one colour per class")
    ignore: tuple[Byte, ...] = Field((), description="labels to ignore in training and evaluation, in addition to 255")
    scale: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="long and short side that images are resized to fit; default: no resizing"
    )
    group: re.Pattern[str] | None = Field(
        None,
        description="regular expression on the relative name; its one capture group is the sample's group; default: "
        "each image is a group of its own",
    )
    splits: Splits = Splits()

    @model_validator(mode="before")
    @classmethod
    def _classes_with_colours(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not isinstance(fields.get("classes"), dict):
            return fields
        if "palette" in fields:
            raise InvalidField("palette", "`classes` has the colours already; remove one")
        return {**fields, "classes": list(fields["classes"]), "palette": list(fields["classes"].values())}

    @field_validator("scale")
    @classmethod
    def _long_side_first(cls, scale: tuple[int, int] | None) -> tuple[int, int] | None:
        return scale and (max(scale), min(scale))

    @model_validator(mode="after")
    def _consistent(self) -> Description:
        for name in self.classes:
            if self.classes.count(name) > 1:
                raise InvalidField("classes", "is listed twice", name)
        if self.palette is not None and len(self.palette) != len(self.classes):
            raise InvalidField("palette", f"has {len(self.palette)} colours for {len(self.classes)} classes")
        for label in self.ignore:
            if label < len(self.classes):
                raise InvalidField("ignore", f"is the label of class {self.classes[label]!r}", label)
        if self.group is not None and self.group.groups != 1:
            raise InvalidField("group", f"has {self.group.groups} capture groups, not one", self.group.pattern)
        return self


class FolderDataset(PairedFiles):
    """The dataset that a YAML file describes. Raises `UserError` for an invalid file."""

    def __init__(self, description: Path, cache: Path) -> None:
        fields = read_description(description)
        default = description.parent.resolve().name if description.stem == "dataset" else description.stem
        self.name = fields.name or default
        self.description = description
        self.root = description.parent / fields.root
        self.cache = cache
        self.classes = fields.classes
        self.palette = fields.palette or distinct_colours(len(fields.classes))
        self.scale = fields.scale
        self.label_table = np.full(256, ILLEGAL, np.int16)
        self.label_table[: len(fields.classes)] = range(len(fields.classes))
        self.label_table[[*fields.ignore, IGNORE_INDEX]] = IGNORE_INDEX
        self._group = fields.group
        with located(description):
            self._folders = fields.splits.folders(self.root / "images")

    def find(self, split: Split) -> list[Sample]:
        if split not in self._folders:
            return []
        images, masks = (self.root / kind / self._folders[split] for kind in ("images", "masks"))
        for folder in (images, masks):
            if not folder.is_dir():
                self.refuse([f"{folder}: no such folder; `splits` and `root` say where the {split} split is"])
        image_of, mask_of = self._by_stem(images, IMAGES), self._by_stem(masks, MASKS)
        lonely = [f"{image_of[stem]}: no mask {masks / stem}.png (or .tif)" for stem in image_of if stem not in mask_of]
        lonely += [f"{mask_of[stem]}: no image {images / stem}.*" for stem in mask_of if stem not in image_of]
        if lonely:
            self.refuse(lonely)
        if not image_of:
            self.refuse([f"{images}: no images ({', '.join(sorted(IMAGES))}); the {split} split is empty"])
        groups = self._groups(split, list(image_of))
        return [
            Sample(f"{split}/{stem}", group, Files(image, mask_of[stem]))
            for (stem, image), group in zip(image_of.items(), groups, strict=True)
        ]

    def _by_stem(self, folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
        found: dict[str, Path] = {}
        twice = []
        for path in sorted(files_below(folder)):
            if path.suffix.lower() not in suffixes:
                continue
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                twice.append(f"{path}: {found[stem].name} has the same name; remove one")
            found[stem] = path
        if twice:
            self.refuse(twice)
        return found

    def _groups(self, split: Split, stems: list[str]) -> list[str]:
        """The group of each name. Raises `UserError` unless the pattern matches all."""
        if self._group is None:
            return [f"{split}/{stem}" for stem in stems]
        matches = [self._group.search(stem) for stem in stems]
        groups = [match[1] for match in matches if match is not None and match[1] is not None]
        if len(groups) < len(stems):
            example = next(s for s, match in zip(stems, matches, strict=True) if match is None or match[1] is None)
            count, so = (f"only {len(groups)}", "and not") if groups else ("none", "such as")
            problem = f"matches {count} of the {len(stems)} names of the {split} split, {so} {example!r}"
            hint = "a name is the path below the split's folder, without suffix"
            raise UserError(problem, field="group", value=self._group.pattern, hint=hint).at(self.description)
        return groups


def read_description(path: Path) -> Description:
    """The checked content of a `dataset.yaml`.

    Raises `UserError` for a file that cannot be read or is not YAML, or for an invalid field.
    """
    fields = read_yaml_file(path, "dataset")
    if not isinstance(fields, dict):
        raise UserError("expected the fields of a dataset, such as `classes: [road, sky]`").at(path)
    try:
        return Description.model_validate(fields)
    except ValidationError as error:
        place: type[BaseModel] = Splits if error.errors()[0]["loc"][:1] == ("splits",) else Description
        raise invalid(error, place.model_fields).at(path) from error


def distinct_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` different colours, always the same.

    The first eight are Okabe and Ito's, which colour-blind people can distinguish; then steps of the golden angle in
    hue over four levels of lightness, so that neighbours differ in more than hue.
    """
    colours = [
        *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)),
        *((86, 180, 233), (213, 94, 0), (240, 228, 66), (64, 64, 64)),
    ]
    step = 0
    while len(colours) < count:
        hue, lightness = step * 0.381966 % 1, (0.3, 0.7, 0.45, 0.85)[step % 4]
        red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 0.6))
        if (red, green, blue) not in colours:
            colours.append((red, green, blue))
        step += 1
    return tuple(colours[:count])
