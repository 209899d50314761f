"""What the check of a dataset's files found: the pixels of each class, and what is odd.

`refusal` is the reason why the files would be read wrongly; what may be intended is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from harness.data.base import IGNORE_INDEX
from harness.data.images import too_dark
from harness.data.masks import Colour, LabelRules
from harness.util.text import counted, list_some

MUCH_IGNORED = 0.5
"""Share of ignored pixels of a split above which there is a warning."""
MUCH_CLIPPED = 0.5
"""Share of values of a split's images at or beyond the ends of `range` above which there is a warning."""


class Checked(NamedTuple):
    """The result of checking one pair."""

    name: str
    """Of the sample; begins with its split."""
    size: tuple[int, int]
    """height, width in pixels"""
    image_sha256: str
    mask_sha256: str
    pixels: np.ndarray
    """int64 [classes + 1]: pixels of each class, and ignored ones."""
    values: frozenset[int]
    """The values in a mask of one channel."""
    palette: dict[int, Colour]
    """The colours of a palette mask that are used."""
    by_colour: bool
    """Whether the stated colours decide how the mask is read."""
    orientation: int
    """EXIF orientation of the image; 1 if the mask has the same."""
    deep_peak: int | None
    """For an image of 16 bits a channel of which the higher 8 are read: their largest value."""
    clipped: float | None
    """Share of the image's values that are at or beyond an end of the stated `range`; None where none is stated."""
    blank: bool
    """Whether all values of the image as it is read are equal."""

    @property
    def split(self) -> str:
        return self.name.partition("/")[0]


class Refusal(NamedTuple):
    """Why a dataset cannot be used."""

    sample: str
    """The first one with the problem."""
    file: Literal["image", "mask"]
    reason: str
    hint: str | None


@dataclass(frozen=True)
class Contents:
    """The checked pairs of a dataset, in the order of splits and names."""

    classes: Sequence[str]
    rules: LabelRules
    states_255: bool
    """Whether the dataset says that 255 is ignored, or that it is a class."""
    states_values: bool
    """Whether the dataset says which values of masks its classes have."""
    checked: Sequence[Checked]

    @property
    def pixels(self) -> dict[str, np.ndarray]:
        """split -> int64 [classes + 1]."""
        sums: dict[str, np.ndarray] = {}
        for found in self.checked:
            sums[found.split] = sums.get(found.split, 0) + found.pixels
        return sums

    @property
    def _total(self) -> np.ndarray:
        return np.sum(list(self.pixels.values()), axis=0)

    def refusal(self) -> Refusal | None:
        """The reason if the pairs are read wrongly, or cannot be trained on or scored."""
        for split, pixels in self.pixels.items():
            first = next(found for found in self.checked if found.split == split)
            present = np.flatnonzero(pixels[:-1])
            if len(present) < (2 if split == "train" else 1):
                only = f"only class {present[0]}" if len(present) else "only ignored pixels"
                reason = f"the masks of {split} hold {only}; labels are class indices"
                return Refusal(first.name, "mask", reason, self._hint_of_255() if pixels[-1] else None)
        return self._binary() or self._palettes() or self._dark()

    def warnings(self) -> list[str]:
        """One line each."""
        of_masks = [*self._absent(), *self._ignored(), *self._class_of_255()]
        return [*of_masks, *self._turned(), *self._clipped(), *self._blank()]

    def _hint_of_255(self) -> str | None:
        if not any(IGNORE_INDEX in found.values for found in self.checked):
            return None
        used = self._total[:-1]
        names = [name for name, count in zip(self.classes, used, strict=True) if count]
        last = next((name for name in reversed(self.classes) if name not in names), self.classes[-1])
        classes = ", ".join([*(f"{value}: {name}" for value, name in enumerate(self.classes) if name != last)])
        return f"if 255 is a class, write `classes: {{{classes}, {IGNORE_INDEX}: {last}}}`"

    def _only_0_and_255(self) -> list[Checked]:
        return [found for found in self.checked if found.values == {0, IGNORE_INDEX}]

    def _asks_for_255(self) -> bool:
        return len(self.classes) == 2 and not self.states_255 and self.rules.table[1] == 1

    def _binary(self) -> Refusal | None:
        """Masks of 0 and 255 beside masks of 0 and 1: 255 is class 1 in some files."""
        found = self._only_0_and_255()
        if not self._asks_for_255() or not found or any({1, IGNORE_INDEX} <= one.values for one in self.checked):
            return None
        where = {one.split for one in found}
        reason = (
            f"holds 0 and 255, as {len(found)} of {len(self.checked)} masks ({', '.join(sorted(where))}); others hold "
            "0 and 1, so 255 seems to be class 1"
        )
        hint = "write 1 in place of 255, or state `ignore: [255]` if these pixels are ignored"
        return Refusal(found[0].name, "mask", reason, hint)

    def _palettes(self) -> Refusal | None:
        """Where nothing is stated, the indices of palette masks are the labels: one colour then has one index."""
        if self.rules.colours or self.states_values:
            return None
        index_of: dict[Colour, tuple[int, str]] = {}
        for found in self.checked:
            if len(set(found.palette.values())) < len(found.palette):
                continue
            for index, colour in found.palette.items():
                other, name = index_of.setdefault(colour, (index, found.name))
                if other != index:
                    reason = (
                        f"the colour {list(colour)} is index {index} in its palette and {other} in that of {name}, so "
                        "a label means two things"
                    )
                    hint = (
                        "state the colours of the classes to read by colour, or their values (`classes: {0: ..., 1: "
                        "...}`) to read by index"
                    )
                    return Refusal(found.name, "mask", reason, hint)
        return None

    def _dark(self) -> Refusal | None:
        deep = [found for found in self.checked if found.deep_peak is not None]
        problem = too_dark(max(found.deep_peak or 0 for found in deep)) if deep else None
        if problem is None:
            return None
        reason = f"16 bits a channel, as {counted(len(deep), 'image')}, but {problem}"
        hint = "state `range: [lowest, highest]` of the values in dataset.yaml"
        return Refusal(deep[0].name, "image", reason, hint)

    def _absent(self) -> Iterator[str]:
        somewhere = self._total[:-1] > 0
        for split, pixels in self.pixels.items():
            found = zip(self.classes, pixels, somewhere, strict=False)
            names = [name for name, count, elsewhere in found if elsewhere and not count]
            if names:
                yield f"{_named(names)} in {split}: not {'trained' if split == 'train' else 'scored'}"
        names = [name for name, found in zip(self.classes, somewhere, strict=True) if not found]
        if names:
            yield f"{_named(names)} in any mask"

    def _ignored(self) -> Iterator[str]:
        for split, pixels in self.pixels.items():
            share = pixels[-1] / pixels.sum()
            if share > MUCH_IGNORED:
                yield f"{100 * share:.0f} % of the pixels of {split} are ignored"

    def _class_of_255(self) -> Iterator[str]:
        if self.states_255 or not any(IGNORE_INDEX in found.values for found in self.checked):
            return
        if self._total[-2] == 0:
            yield f"255 is ignored and class {self.classes[-1]} never occurs; {self._hint_of_255()}"
        found = self._only_0_and_255()
        if self._asks_for_255() and found:
            yield (
                f"{counted(len(found), 'mask')} ({found[0].name} first) hold 0 and 255 but not 1; 255 is ignored: "
                "state `ignore: [255]` if that is right"
            )

    def _turned(self) -> Iterator[str]:
        turned = [
            found
            for found in self.checked
            if found.orientation in (2, 3, 4) or (found.orientation > 4 and found.size[0] == found.size[1])
        ]
        if turned:
            yield (
                f"{counted(len(turned), 'image')} ({turned[0].name} first) turned by EXIF orientation, and the mask is "
                "not: check that they match"
            )

    def _clipped(self) -> Iterator[str]:
        for split in self.pixels:
            shares = [one.clipped for one in self.checked if one.split == split and one.clipped is not None]
            if shares and np.mean(shares) > MUCH_CLIPPED:
                yield (
                    f"{100 * np.mean(shares):.0f} % of the image values of {split} are at or beyond an end of `range`, "
                    "or NaN: they become black or white"
                )

    def _blank(self) -> Iterator[str]:
        blank = [found for found in self.checked if found.blank]
        if blank:
            yield f"{counted(len(blank), 'image')} ({blank[0].name} first) blank: all values are equal"


def hint_of_values(classes: Sequence[str], table: np.ndarray, files: Sequence[frozenset[int]]) -> str | None:
    """What to write if masks hold values that are not declared; `files` are the values of each mask."""
    if table[: len(classes)].tolist() != list(range(len(classes))):
        return None
    values = sorted(frozenset().union(*files) - {IGNORE_INDEX})
    if values[-1:] == [len(classes)] and values[0] >= 0:
        when = "if 0 is unlabelled" if values[0] == 0 else "if the classes are numbered from 1"
        return f"{when}, write `reduce_zero_label: true`"
    if len(values) == len(classes):
        pairs = ", ".join(f"{value}: {name}" for value, name in list(zip(values, classes, strict=True))[:4])
        more = ", ..." if len(values) > 4 else ""
        return f"if these are the values of the classes, write `classes: {{{pairs}{more}}}`"
    return None


def _named(names: Sequence[str]) -> str:
    return f"class {names[0]} never occurs" if len(names) == 1 else f"classes {list_some(names)} never occur"
