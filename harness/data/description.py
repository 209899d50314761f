"""The YAML file that describes a user's own dataset: its fields, their checks, and the forms of `classes`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from harness.data.base import IGNORE_INDEX, Split
from harness.data.layout import ANNOTATIONS, LIST, has_control, pattern_problem
from harness.data.masks import ILLEGAL, Colour, LabelRules
from harness.errors import InvalidField, UserError, invalid
from harness.util.files import read_yaml_file

Byte = Annotated[int, Field(ge=0, le=255)]
LONGEST_NAME = 100
"""Characters of a class's name: it appears in tables, plots and file headers."""
_REDUCE = "`reduce_zero_label: true` ignores 0 and numbers the classes from 1; leave `ignore` and class 0 out"

_EXPECTED = {
    "train": "a name; `test: 0.2` holds out a fifth of train",
    "dev": "a name; without `dev`, a part of train is held out as dev",
    "test": "a name, or a fraction above 0 and below 1",
}


class Splits(BaseModel):
    """Which files are which split. A name fills `{split}` in the patterns; a text file lists the images by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str | None = Field(
        None, description="default: `train`; all files if `test` is a fraction and there is no `train`"
    )
    dev: str | None = Field(
        None,
        description="default: `val`, if that exists and `test` is a fraction or the default `test`; else dev is held "
        "out of train",
    )
    test: str | float | None = Field(
        None, description="default: `test` if it exists, else `val`; a fraction is held out of train by group"
    )

    @field_validator("train", "dev", "test", mode="before")
    @classmethod
    def _check_name(cls, name: Any, info: ValidationInfo) -> Any:
        if isinstance(name, float) and info.field_name == "test":
            if not 0 < name < 1:
                raise ValueError("a fraction is above 0 and below 1")
        elif isinstance(name, int | float) and not isinstance(name, bool):
            raise ValueError(f"expected {_EXPECTED[info.field_name or '']}; write a name that is a number in quotes")
        elif name is not None and not isinstance(name, str):
            raise ValueError(_misread(name))
        elif name is not None and (not name or has_control(name) or Path(name).is_absolute()):
            raise ValueError("use the name of a folder, or of a list of names, below `root`")
        return name

    def named(self, exists: Callable[[str], bool]) -> dict[Split, str | float]:
        """The name, or the fraction, of each split that there is; `exists` says whether a default name exists.

        Raises `UserError` if two splits have one name.
        """
        test, held_out = self.test, isinstance(self.test, float)
        beside = held_out or (test is None and exists("test"))
        dev = self.dev or ("val" if beside and exists("val") else None)
        if test is None:
            test = "test" if exists("test") or dev == "val" else "val"
        train = self.train or ("train" if not held_out or exists("train") else ".")
        names: dict[Split, str | float] = {"train": train, **({"dev": dev} if dev else {}), "test": test}
        owner: dict[str, Split] = {}
        for split, name in names.items():
            if isinstance(name, str) and (other := owner.setdefault(os.path.normpath(name), split)) != split:
                problem = f"is the {'list' if name.endswith(LIST) else 'folder'} of the {other} split too"
                raise UserError(problem, field=f"splits.{split}", value=name, hint="splits must not overlap")
        return names


class Description(BaseModel):
    """The fields of the YAML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(None, description="default: the file's name, or the folder's for `dataset.yaml`")
    root: str = Field(".", description="folder of the patterns and of lists of names, relative to the YAML file")
    image: str = Field(
        "images/{split}/{stem}", description="pattern of the images' paths; without suffix: any format that is read"
    )
    mask: str = Field(
        "masks/{split}/{stem}", description="pattern of the masks' paths; or one .json of COCO annotations for a split"
    )
    classes: tuple[str, ...] = Field(
        min_length=2,
        max_length=IGNORE_INDEX,
        description="names in order of labels, or a mapping: name: [r, g, b], name: '#rrggbb', or value: name",
    )
    codes: tuple[int, ...] | None = Field(
        None, description="the value of each class in masks, as the keys of `classes: {10: tree, 20: road}`"
    )
    palette: tuple[tuple[Byte, Byte, Byte], ...] | None = Field(
        None, description="one colour per class; masks of these colours are read by them"
    )
    ignore: tuple[int | tuple[Byte, Byte, Byte], ...] = Field(
        (),
        description="values or colours of masks to ignore in training and evaluation, in addition to 255 (unless that "
        "is a class); `ignore: [255]` confirms that 255 is to be ignored",
    )
    reduce_zero_label: bool = Field(False, description="0 in masks is ignored, and the classes begin at 1")
    range: tuple[float, float] | None = Field(
        None, description="lowest and highest value of images of 16 bits or floats, which become 0 and 255"
    )
    bands: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="red, green and blue among the bands of an image (or one for grey), counted from 1"
    )
    scale: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="long and short side that images are resized to fit; default: no resizing"
    )
    group: re.Pattern[str] | None = Field(
        None,
        description="regular expression on the relative name; its one capture group is the sample's group; default: "
        "each image is a group of its own",
    )
    splits: Splits = Splits()
    unlabelled: str | None = Field(
        None, description="for COCO annotations: the class of pixels outside of all objects, or `ignore`"
    )

    @model_validator(mode="before")
    @classmethod
    def _forms_of_classes(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not isinstance(fields.get("classes"), (dict, list)):
            return fields
        classes = fields["classes"]
        if isinstance(classes, list):
            _check_names(classes, "[{}]")
            return fields
        if classes and all(_is_code(key) for key in classes):
            return _with(fields, classes.values(), codes=list(classes))
        if classes and all(_is_code(value) for value in classes.values()):
            return _with(fields, classes, codes=list(classes.values()))
        return _with(fields, classes, palette=[_colour(value) for value in classes.values()])

    @field_validator("image", "mask", mode="before")
    @classmethod
    def _check_pattern(cls, text: Any, info: ValidationInfo) -> Any:
        if isinstance(text, dict):
            raise ValueError("YAML reads { as a mapping; write the pattern in quotes")
        problem = pattern_problem(text, info.field_name == "mask") if isinstance(text, str) else None
        if problem:
            raise ValueError(problem)
        return text

    @field_validator("unlabelled", "name", mode="before")
    @classmethod
    def _check_name(cls, name: Any) -> Any:
        if name is not None and not isinstance(name, str):
            raise ValueError(_misread(name))
        return name

    @field_validator("scale")
    @classmethod
    def _long_side_first(cls, scale: tuple[int, int] | None) -> tuple[int, int] | None:
        return scale and (max(scale), min(scale))

    @model_validator(mode="after")
    def _consistent(self) -> Description:
        for name in self.classes:
            if self.classes.count(name) > 1:
                raise InvalidField("classes", "is listed twice", name)
            if not name.isprintable() or not 1 <= len(name) <= LONGEST_NAME:
                problem = f"expected one line of 1 to {LONGEST_NAME} characters"
                raise InvalidField("classes", problem, name[:LONGEST_NAME])
        if self.palette is not None and len(self.palette) != len(self.classes):
            raise InvalidField("palette", f"has {len(self.palette)} colours for {len(self.classes)} classes")
        if self.codes is not None:
            if len(self.codes) != len(self.classes):
                raise InvalidField("codes", f"has {len(self.codes)} values for {len(self.classes)} classes")
            if len(set(self.codes)) < len(self.codes):
                raise InvalidField("codes", "has a value twice", list(self.codes))
            if self.reduce_zero_label:
                raise InvalidField("reduce_zero_label", "the values of the classes are stated already; remove one")
        label_of = dict(zip(self._values(), self.classes, strict=True))
        if self.is_annotated and self.codes is None:
            label_of = {}  # `ignore` has ids of categories, and classes have none
        colours = dict(zip(self.palette or (), self.classes, strict=False))
        for ignored in self.ignore:
            if self.palette is None and not isinstance(ignored, int):
                raise InvalidField("ignore", "is a colour, but no colours of classes are stated", list(ignored))
            found = label_of.get(ignored) if isinstance(ignored, int) else colours.get(ignored)
            if found is not None:
                hint = f"; {_REDUCE}" if ignored == 0 and self.codes is None else ""
                what = "label" if isinstance(ignored, int) else "colour"
                raise InvalidField("ignore", f"is the {what} of class {found!r}{hint}", ignored)
        if self.image == self.mask:
            raise InvalidField("mask", "is the pattern of the images too", self.mask)
        self._check_annotations()
        if self.range is not None and not self.range[0] < self.range[1]:
            raise InvalidField("range", "expected [lowest, highest]", list(self.range))
        if self.bands is not None and len(self.bands) not in (1, 3):
            raise InvalidField("bands", "expected [red, green, blue], or one band", list(self.bands))
        if self.group is not None and self.group.groups != 1:
            raise InvalidField("group", f"has {self.group.groups} capture groups, not one", self.group.pattern)
        return self

    @property
    def is_annotated(self) -> bool:
        """Whether the masks are COCO annotations."""
        return self.mask.endswith(ANNOTATIONS)

    def _check_annotations(self) -> None:
        if not self.is_annotated:
            if self.unlabelled is not None:
                raise InvalidField(
                    "unlabelled", "is only for COCO annotations; masks label every pixel", self.unlabelled
                )
            return
        if self.unlabelled not in (*self.classes, "ignore"):
            problem = f"which class are pixels outside of all objects? Expected one of {list(self.classes)}, or ignore"
            raise InvalidField("unlabelled", problem, self.unlabelled)
        if self.reduce_zero_label:
            raise InvalidField("reduce_zero_label", "is only for masks, not for COCO annotations")

    def _values(self) -> Sequence[int]:
        """The value of each class in masks of one channel."""
        first = 1 if self.reduce_zero_label else 0
        return self.codes if self.codes is not None else range(first, first + len(self.classes))

    def label_rules(self) -> LabelRules:
        """What the pixels of masks mean; those of rasterised annotations are labels."""
        table = np.full(256, ILLEGAL, np.int16)
        wide: dict[int, int] = {}
        values = [value for value in self.ignore if isinstance(value, int) and not self.is_annotated]
        pairs = [(IGNORE_INDEX, IGNORE_INDEX), *((value, IGNORE_INDEX) for value in values)]
        pairs += [(0, IGNORE_INDEX)] if self.reduce_zero_label else []
        classes = range(len(self.classes)) if self.is_annotated else self._values()
        for value, label in [*pairs, *zip(classes, range(len(self.classes)), strict=True)]:
            if 0 <= value <= 255:
                table[value] = label
            else:
                wide[value] = label
        colours: dict[Colour, int] = {}
        if self.palette is not None and len(set(self.palette)) == len(self.palette):
            colours = dict(zip(self.palette, range(len(self.palette)), strict=True))
            colours.update((value, IGNORE_INDEX) for value in self.ignore if not isinstance(value, int))
        return LabelRules(table, wide, colours)


def read_description(path: Path) -> Description:
    """The checked content of a `dataset.yaml`.

    Raises `UserError` for a file that cannot be read or is not YAML, or for an invalid field.
    """
    try:
        fields = read_yaml_file(path, "dataset")
    except UserError as error:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.search(r"^\s*(image|mask): *\{", path.read_text(encoding="utf-8"), re.MULTILINE):
                error.hint = "write a pattern that begins with { in quotes"
        raise
    if not isinstance(fields, dict):
        raise UserError("expected the fields of a dataset, such as `classes: [road, sky]`").at(path)
    try:
        return Description.model_validate(fields)
    except ValidationError as error:
        place: type[BaseModel] = Splits if error.errors()[0]["loc"][:1] == ("splits",) else Description
        raise invalid(error, place.model_fields).at(path) from error


def _with(fields: dict[str, Any], names: Any, **more: list[Any]) -> dict[str, Any]:
    """The fields with `classes` as a list of names, and the values or colours of its mapping as a separate field."""
    _check_names(list(names), "")
    for field in more:
        if field in fields:
            what = {"palette": "colours", "codes": "values"}[field]
            raise InvalidField(field, f"`classes` has the {what} already; remove one")
    return {**fields, "classes": list(names), **more}


def _check_names(names: list[Any], place: str) -> None:
    """YAML reads some names as something else."""
    for number, name in enumerate(names):
        if isinstance(name, str):
            continue
        raise InvalidField(f"classes{place.format(number)}", _misread(name), "null" if name is None else name)


def _misread(name: Any) -> str:
    """What to do about a name that YAML reads as something else."""
    spelt = {True: "yes, on and true", False: "no, off and false", None: "null and ~"}
    what = spelt[name] if name is None or isinstance(name, bool) else None
    return f"YAML reads {what} like this; write the name in quotes" if what else "write the name in quotes"


def _is_code(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _colour(value: Any) -> Any:
    """[r, g, b] of '#rrggbb'; another value unchanged."""
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        return [int(value[i : i + 2], 16) for i in (1, 3, 5)]
    return value
