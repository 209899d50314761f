"""Where the images and the masks of a dataset lie: one pattern of paths for each, and what fills in its `{split}`.

A pattern is a path below the dataset's root. `{stem}` is what an image and its mask have in common, which may contain
folders; `{split}` is the name of a split. `a/{stem}.png` means files of that suffix, in upper or lower case;
`a/{stem}` those of any format that is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from harness.data.base import Split
from harness.data.file_pairs import Files, files_below
from harness.errors import UserError

SPLIT, STEM = "{split}", "{stem}"
ANNOTATIONS = ".json"
"""Suffix of a mask pattern that means one COCO file for all images of a split."""
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"})
MASKS = frozenset({".png", ".tif", ".tiff"})
OTHER_MASKS = frozenset({".gif", ".bmp", ".ppm", ".pgm", ".npy"})
"""Read only for images without a mask in the formats above: folders of masks hold previews in these formats too."""
UNREAD = frozenset(
    {".ppm", ".pgm", ".pnm", ".gif", ".jfif", ".jpe", ".jp2", ".j2k", ".heic", ".heif", ".avif", ".tga", ".psd", ".pcx"}
    | {".npy", ".exr", ".hdr", ".dng", ".nef", ".cr2", ".dcm", ".nii", ".mat", ".img", ".svs"}
)
"""Formats of images that are not read unless the pattern names them: such a file is an error, not left out."""


LIST = ".txt"
"""Suffix of a split's name that means a list of images."""


def pattern_problem(text: str, of_masks: bool) -> str | None:
    """What is wrong with a pattern as a user wrote it."""
    if has_control(text):
        return "has a line break or another control character"
    unknown = sorted(set(re.findall(r"\{.*?\}", text)) - {SPLIT, STEM})
    if unknown:
        return f"{unknown[0]} is not known; use {STEM} and {SPLIT}"
    if PurePosixPath(text).is_absolute() or ".." in PurePosixPath(text).parts:
        return "a path below `root`; change `root` if the files are elsewhere"
    if STEM not in text and not (of_masks and text.endswith(ANNOTATIONS)):
        return f"has no {STEM}, the part of the name that an image and its mask share"
    return None


def has_control(text: str) -> bool:
    """Whether a text has line breaks, NUL and the like, which no name of a file should have."""
    return any(ord(character) < 32 for character in text)


def without_split(text: str) -> str:
    """The pattern of files that are in no folder of a split: `images/{split}/{stem}` is `images/{stem}`."""
    return text.replace(f"{SPLIT}/", "")


@dataclass(frozen=True)
class Pattern:
    """The image files, or the mask files, of one split."""

    root: Path
    text: str
    """Relative to the root, without `{split}`."""
    read_formats: tuple[frozenset[str], ...]
    """Suffixes that are read where the text has none; the first ones take precedence."""

    @property
    def folder(self) -> Path:
        """The folder below which all of the files are."""
        parts = PurePosixPath(self.text).parts[:-1]
        return self.root.joinpath(*parts[: next((i for i, part in enumerate(parts) if STEM in part), len(parts))])

    @property
    def suffix(self) -> str:
        """As the text has it; empty for all formats that are read."""
        return PurePosixPath(self.text).suffix

    @property
    def literal(self) -> int:
        """Characters besides the stem. A file that two patterns match belongs to the one with more of them."""
        return len(self.text.replace(STEM, ""))

    @property
    def shown_formats(self) -> str:
        """`.png, .tif` for messages."""
        return self.suffix or ", ".join(sorted(frozenset().union(*self.read_formats)))

    @property
    def formats(self) -> tuple[frozenset[str], ...]:
        """As `read_formats`; one empty set, which stands for all, where the text has a suffix."""
        return (frozenset(),) if self.suffix else self.read_formats

    def path(self, stem: str, suffix: str = "") -> Path:
        """Where the file of a stem is; `suffix` where the text has none."""
        return self.root / (self.text.replace(STEM, stem) + (suffix if not self.suffix else ""))

    def stem(self, path: Path) -> str | None:
        """The stem of a file, without regard to its format where the text has no suffix; None if it does not match."""
        match = self._expression.fullmatch(path.relative_to(self.root).as_posix())
        return match["stem"] if match else None

    @property
    def is_annotations(self) -> bool:
        """Whether it is one COCO file instead of a file for each image."""
        return STEM not in self.text

    def files(self) -> dict[Path, str]:
        """The stem of each file that matches, in the order of paths."""
        if self.is_annotations:
            return {}
        return {path: stem for path in sorted(files_below(self.folder)) if (stem := self.stem(path)) is not None}

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        body = self.text.removesuffix(self.suffix)
        first, *others = (re.escape(part) for part in body.split(STEM))
        body = first + "(?P<stem>.+)" + "(?P=stem)".join(others) if others else first
        return re.compile(f"{body}(?i:{re.escape(self.suffix)})" if self.suffix else rf"{body}\.[^./]+", re.DOTALL)


@dataclass(frozen=True)
class FileLayout:
    """The two patterns of a dataset, as its description has them."""

    root: Path
    image: str
    mask: str

    def patterns(self, name: str) -> tuple[Pattern, Pattern]:
        """The patterns of images and masks for a split of this name; for a list or `.`, without the split's folder."""
        texts = [
            without_split(text) if _has_no_folder(name) else text.replace(SPLIT, name)
            for text in (self.image, self.mask)
        ]
        return Pattern(self.root, texts[0], (IMAGES,)), Pattern(self.root, texts[1], (MASKS, OTHER_MASKS))

    def decides(self, text: str, name: str) -> bool:
        """Whether every file of one of the patterns belongs to the split of this name."""
        return SPLIT in text or _has_no_folder(name)

    def has(self, name: str) -> bool:
        """Whether there are files of a split of this name."""
        text = self.image if SPLIT in self.image else self.mask
        if SPLIT not in text:
            return False
        pattern = Pattern(self.root, text.replace(SPLIT, name), ())
        if SPLIT in text.partition(STEM)[0].rpartition("/")[0]:
            return os.path.isdir(pattern.folder)
        return bool(pattern.files()) or (pattern.is_annotations and os.path.isfile(pattern.path("")))

    def check(self, names: Mapping[Split, str | float]) -> None:
        """Raises `UserError` where the patterns cannot tell one split from another."""
        for split, name in names.items():
            if not isinstance(name, str):
                continue
            for field, text in (("image", self.image), ("mask", self.mask)):
                if _has_no_folder(name) and SPLIT in without_split(text):
                    problem = f"has {SPLIT} within a name, but the {split} split is {name}, which fills in none"
                    raise UserError(problem, field=field, value=text, hint=f"leave {SPLIT} out")
            if not _has_no_folder(name) and SPLIT not in self.image + self.mask:
                problem = f"which images are the {split} split? Neither `image` nor `mask` has {SPLIT}"
                hint = "name lists, `splits: {train: train.txt, test: test.txt}`, or a fraction: `splits: {test: 0.2}`"
                raise UserError(problem, field="splits", hint=hint)


class FoundFiles:
    """The files that the two patterns of a split match, by stem; for a file that both match see `Pattern.literal`."""

    def __init__(self, image: Pattern, mask: Pattern) -> None:
        self.image, self.mask = image, mask
        self.problems: list[str] = []
        """Files that share a stem."""
        images, masks = image.files(), mask.files()
        for path in images.keys() & masks.keys():
            (masks if image.literal >= mask.literal else images).pop(path)
        self._matched = images.keys() | masks.keys()
        self.images = self._of_formats(images, image.formats[0])
        self.masks = self._of_formats(masks, mask.formats[0])
        for formats in mask.formats[1:]:
            without = self.images.keys() - self.masks.keys()
            self.masks |= {stem: path for stem, path in self._of_formats(masks, formats).items() if stem in without}
        self._unread_masks = {stem: path for path, stem in masks.items() if stem not in self.masks}
        self.unread_images = [
            path for path, stem in images.items() if path.suffix.lower() in UNREAD and stem not in self.images
        ]

    @property
    def pairs(self) -> dict[str, Files]:
        """The images that have a mask."""
        return {stem: Files(path, self.masks[stem]) for stem, path in self.images.items() if stem in self.masks}

    def no_mask(self, stem: str) -> str:
        """What is wrong with an image without a mask."""
        image, mask = self.images[stem], self.mask
        if mask.is_annotations:
            return f"{image}: is not among the images of {mask.path('')}"
        if unread := self._unread_masks.get(stem):
            return f"{image}: its mask {unread} is a {unread.suffix}, which is not read; save it as a PNG"
        more = "" if mask.suffix else f" (or another of {mask.shown_formats})"
        return f"{image}: no mask {mask.path(stem, '.png')}{more}"

    def no_image(self, stem: str) -> str:
        """What is wrong with a mask without an image."""
        return f"{self.masks[stem]}: no image {self.image.path(stem, '.*')}"

    def stem_of_path(self) -> dict[str, str]:
        """The stem of each image by its path below the images' folder, and below the root."""
        folders = (self.image.folder, self.image.root)
        return {p.relative_to(folder).as_posix(): stem for stem, p in self.images.items() for folder in folders}

    def pictures(self) -> set[Path]:
        """The images, and the pictures beside them that match neither pattern."""
        beside = {path for path in files_below(self.image.folder) if path.suffix.lower() in IMAGES}
        return {*self.images.values(), *self.unread_images} | (beside - self._matched)

    def _of_formats(self, stems: Mapping[Path, str], formats: frozenset[str]) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path, stem in stems.items():
            if formats and path.suffix.lower() not in formats:
                continue
            if stem in found:
                self.problems.append(f"{path}: {found[stem].name} has the same name; remove one")
            found[stem] = path
        return found


def two_paths(line: str, root: Path) -> Files | None:
    """The image and the mask that a line of a list names, with a tab, comma or spaces between them; else None."""
    for separator in ("\t", ",", None):
        parts = [root / part.strip() for part in line.split(separator)]
        below = (Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)) for path in parts)
        if len(parts) == 2 and all(below) and all(os.path.isfile(path) for path in parts):
            return Files(parts[0], parts[1])
    return None


def _has_no_folder(name: str) -> bool:
    return name.endswith(LIST) or PurePosixPath(name) == PurePosixPath(".")
