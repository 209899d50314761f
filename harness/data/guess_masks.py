"""Guesses what masks hold: whether files are masks at all, and which values or colours are classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from harness.data.base import IGNORE_INDEX
from harness.data.masks import Colour, MaskFile, read_mask
from harness.errors import UserError
from harness.util.text import counted, list_some

MOST_CLASSES = 64
"""Values or colours in one file above which it is taken for an image."""
_SAMPLE = 200
"""The most masks that are read."""
_NAME_FILES = ("classes.txt", "labels.txt", "class_names.txt", "label_names.txt", "names.txt")
_FEWEST_BETWEEN = 4
"""The least number of values between 0 and 255 that counts as soft edges."""
_SHARE_OF_ENDS = 0.75
"""In masks with soft edges, more than this share of the pixels is 0 or 255."""
_SOFT_EDGES = (
    "most pixels are 0 or 255, and few lie between: binary masks with soft edges (anti-aliased, or once JPEG); save "
    "them as two values, such as `mask > 127`"
)
T = TypeVar("T")


class MaskKind(NamedTuple):
    """What some files hold, as images or as masks."""

    reason: str
    """Why they are not masks; empty if they can be."""
    colours: bool
    values: int
    """The most values, or colours, in one file."""

    @property
    def as_images(self) -> tuple[bool, bool]:
        """The smaller, the more likely these are images: many colours, then many greys, then few colours."""
        return not self.reason, not self.colours


def kind_of(paths: Sequence[Path]) -> MaskKind:
    """What the files hold. Reads all of them."""
    colours, most = False, 0
    values: Counter[int] = Counter()
    for path in paths:
        try:
            mask = read_mask(path.read_bytes())
        except Exception as error:  # Pillow raises many kinds for files that it cannot read
            return MaskKind(" ".join(str(error).split()) or type(error).__name__, True, 0)
        found = _colours(mask)
        values.update({} if found else _counts(mask.pixels))
        colours, most = colours or bool(found), max(most, len(found) or len(mask.values))
    if _has_soft_edges(values):
        return MaskKind(f"{paths[0].name} and others: {_SOFT_EDGES}", colours, most)
    return MaskKind(f"{paths[0].name} has {most} values" if most > MOST_CLASSES else "", colours, most)


class Classes(NamedTuple):
    """The field `classes` of a description."""

    entries: list[str]
    """The lines of the mapping."""
    comment: str
    summary: str


def guess_classes(root: Path, masks: Sequence[Path]) -> Classes:
    """Reads up to 200 of the masks. Names are those of a file such as `classes.txt` in the root, or placeholders.

    Raises `UserError` for binary masks with soft edges.
    """
    values: Counter[int] = Counter()
    colours: Counter[Colour] = Counter()
    palette: dict[int, set[Colour]] = {}
    some = some_of(masks, _SAMPLE)
    for path in some:
        try:
            mask = read_mask(path.read_bytes())
        except Exception:  # `harness check` names the file
            continue
        found = _colours(mask)
        colours.update(found)
        if not found:
            values.update(_counts(mask.pixels))
        for index, colour in mask.used_palette.items():
            palette.setdefault(index, set()).add(colour)
    seen = f"in {len(some)} of {counted(len(masks), 'mask')}"
    if any(len(several) > 1 for several in palette.values()):  # the order differs from file to file
        colours.update(colour for several in palette.values() for colour in several)
    if _has_soft_edges(values):
        raise UserError(f"{masks[0].parent}: {_SOFT_EDGES}")
    if colours:
        return _of_colours(root, colours, seen)
    return _of_values(root, values, {index: next(iter(several)) for index, several in palette.items()}, seen)


def _of_colours(root: Path, colours: Counter[Colour], seen: str) -> Classes:
    black = (0, 0, 0)
    ordered = sorted(colours, key=lambda colour: (colour != black, -colours[colour], colour))
    names = _names(root, len(colours), black in colours)
    count = counted(len(colours), "colour")
    return Classes(
        [f"{name}: {list(colour)}" for name, colour in zip(names, ordered, strict=True)],
        f"{count} {seen}; name the classes, move others to `ignore: [[r, g, b]]`",
        f"masks of {count}",
    )


def _of_values(root: Path, values: Counter[int], palette: dict[int, Colour], seen: str) -> Classes:
    """With the colours of the palette where the values are the labels."""
    labels = sorted(values)
    if IGNORE_INDEX in labels and labels not in ([IGNORE_INDEX], [0, IGNORE_INDEX]):
        labels.remove(IGNORE_INDEX)
    most = max(labels, key=lambda value: values[value])
    names = _names(root, len(labels), labels[0] == 0 and (most == 0 or len(labels) == 2))
    comment = f"values {list_some([str(value) for value in sorted(values)], 12)} {seen}"
    if IGNORE_INDEX in values and IGNORE_INDEX not in labels:
        comment += f"; {IGNORE_INDEX} is ignored, unless you add `{IGNORE_INDEX}: name`"
    entries = [f"{value}: {name}" for value, name in zip(labels, names, strict=True)]
    if labels == list(range(len(labels))) and palette.keys() >= set(labels):
        entries = [f"{name}: {list(palette[value])}" for value, name in zip(labels, names, strict=True)]
    return Classes(entries, f"{comment}; name the classes", f"masks of {counted(len(labels), 'value')}")


def _names(root: Path, count: int, background: bool) -> list[str]:
    """Names from a file of as many lines, else placeholders."""
    for file in _NAME_FILES:
        try:
            found = [
                line.strip() for line in (root / file).read_text(encoding="utf-8-sig").splitlines() if line.strip()
            ]
        except (OSError, UnicodeDecodeError):
            continue
        if len(set(found)) == len(found) == count:
            return [quoted(name) for name in found]
    first = ["background" if background else "class_0"]
    return [*first, *(["foreground"] if background and count == 2 else [f"class_{n}" for n in range(1, count)])]


def _colours(mask: MaskFile) -> Counter[Colour]:
    """The pixels of each colour of a mask of colours; empty for a mask of values."""
    if mask.pixels.ndim == 2 or (mask.pixels == mask.pixels[..., :1]).all():
        return Counter()
    red, green, blue = (mask.pixels[..., channel].astype(np.int32) for channel in range(3))
    packed, counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)
    colours = ((value >> 16, value >> 8 & 255, value & 255) for value in packed.tolist())
    return Counter(dict(zip(colours, counts.tolist(), strict=True)))


def _counts(values: np.ndarray) -> dict[int, int]:
    """How often each value occurs."""
    numbers, counts = np.unique(values, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _has_soft_edges(counts: Mapping[int, int]) -> bool:
    """Whether most pixels are 0 or 255, and few are spread over many values between them."""
    between = [value for value in counts if value not in (0, 255)]
    ends = counts.get(0, 0), counts.get(255, 0)
    if len(between) < _FEWEST_BETWEEN or not 0 <= min(between) < 128 <= max(between) < 255:
        return False
    most = max(counts[value] for value in between)
    return min(ends) > most and sum(ends) > _SHARE_OF_ENDS * sum(counts.values())


def some_of(files: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of the files, evenly spaced."""
    return [files[round(place)] for place in np.linspace(0, len(files) - 1, min(most, len(files)))]


def quoted(text: str) -> str:
    """The text in YAML, with quotes where they are needed."""
    import yaml

    return (
        yaml.safe_dump(text, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("\n...\n").strip()
    )
