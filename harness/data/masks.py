"""Mask files: decodes them without loss, and maps what they hold (values, palette or colours) to class indices."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageOps

from harness.data.base import IGNORE_INDEX
from harness.data.coco import rasterise

ILLEGAL = -1
"""In a label table: a value that is not allowed in a mask."""

Colour = tuple[int, int, int]

_PHOTOMETRIC, _SUBFILE, _WHITE_IS_ZERO = 262, 254, 0  # TIFF tags, and a value of the first
_LABELS_IN_ONE_CHANNEL = "save class indices as one 8-bit channel"


@dataclass(eq=False)
class MaskFile:
    """A decoded mask."""

    pixels: np.ndarray
    """Whole numbers [H, W] (uint8 if they fit), or colours uint8 [H, W, 3]."""
    palette: np.ndarray | None = None
    """uint8 [entries, 3], RGB, of a palette image, whose pixels are indices."""

    @cached_property
    def values(self) -> frozenset[int]:
        """The values in a mask of one channel; empty for colours."""
        if self.pixels.ndim == 3:
            return frozenset()
        if self.pixels.dtype == np.uint8:
            return frozenset(np.flatnonzero(np.bincount(self.pixels.ravel(), minlength=256)).tolist())
        return frozenset(np.unique(self.pixels).tolist())

    @property
    def used_palette(self) -> dict[int, Colour]:
        """The colour of each index that is used; empty without a palette."""
        if self.palette is None:
            return {}
        return {i: _colour(self.palette[i]) for i in sorted(self.values) if i < len(self.palette)}


@dataclass(frozen=True)
class LabelRules:
    """What the pixels of masks mean."""

    table: np.ndarray
    """int16 [256]: a value to a class, `IGNORE_INDEX` or `ILLEGAL`."""
    wide: Mapping[int, int] = field(default_factory=dict)
    """The same for values outside 0..255."""
    colours: Mapping[Colour, int] = field(default_factory=dict)
    """The same for the colours that the dataset states; empty where it states none."""

    def codes(self, classes: int) -> tuple[int, ...] | None:
        """The value of each class in a mask of one channel, the lowest of several; None if it is the class's index."""
        label_of = {**dict(enumerate(self.table.tolist())), **self.wide}
        found = tuple(min(value for value, label in label_of.items() if label == one) for one in range(classes))
        return None if found == tuple(range(classes)) else found

    def read(self, content: bytes) -> MaskFile:
        """As `read_mask`; a grey mask of several channels is reduced to one unless colours are stated.

        Raises `ValueError` for colours if none are stated.
        """
        mask = read_mask(content)
        if mask.pixels.ndim == 2 or self.colours:
            return mask
        if not (mask.pixels == mask.pixels[..., :1]).all():
            raise ValueError(
                f"a colour mask; {_LABELS_IN_ONE_CHANNEL}, or state a different colour for each class: "
                "classes: {road: [128, 64, 128], ...}"
            )
        return MaskFile(np.ascontiguousarray(mask.pixels[..., 0]))

    def labels(self, mask: MaskFile) -> np.ndarray:
        """int16 [H, W]: classes, `IGNORE_INDEX` and `ILLEGAL`. Raises `ValueError` if a palette contradicts them."""
        pixels = mask.pixels
        if pixels.ndim == 3:
            red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
            return _colour_table(tuple(self.colours.items()))[red << 16 | green << 8 | blue]
        if pixels.dtype == np.uint8:
            return (self.table if mask.palette is None else self._palette_table(mask))[pixels]
        narrow = (pixels >= 0) & (pixels <= 255)
        labels = np.where(narrow, self.table[np.where(narrow, pixels, 0)], np.int16(ILLEGAL))
        for value, label in self.wide.items():
            labels[pixels == value] = label
        return labels

    def by_colour(self, mask: MaskFile) -> bool:
        """Whether the stated colours decide how a mask is read: of colours, or of a palette in another order."""
        if mask.pixels.ndim == 3:
            return True
        return mask.palette is not None and self._palette_table(mask) is not self.table

    def _palette_table(self, mask: MaskFile) -> np.ndarray:
        """The label of each index: of its colour if the dataset states the colours in use, else of its value."""
        found = mask.used_palette
        stated = {index: self.colours[colour] for index, colour in found.items() if colour in self.colours}
        # A palette of other colours than the stated ones is for display alone, and so is one in the same order.
        if all(label == self.table[index] for index, label in stated.items()):
            return self.table
        table = np.full(256, ILLEGAL, np.int16)
        for index in mask.values:
            if index in stated:
                table[index] = stated[index]
            elif self.table[index] == IGNORE_INDEX:
                table[index] = IGNORE_INDEX
            else:
                wrong = next(i for i in stated if stated[i] != self.table[i])
                raise ValueError(
                    f"its palette contradicts dataset.yaml: index {wrong} has the colour {list(found[wrong])} of "
                    f"another class, but index {index} has {_shown(found.get(index))}, which is of none; state the "
                    "colours of the palette"
                )
        return table


def read_mask(content: bytes) -> MaskFile:
    """A mask of one channel, a palette or colours, turned by its own EXIF orientation; or COCO objects, as JSON.

    Raises `ValueError` with the reason where its values are not labels, and what Pillow raises for a damaged file.
    """
    if content.startswith(b"\x93NUMPY"):
        return MaskFile(_whole(_array(content)))
    if content.startswith(b"{"):
        return MaskFile(rasterise(content))
    with Image.open(io.BytesIO(content)) as opened:
        _check_single(opened)
        if opened.format == "TIFF" and opened.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # type: ignore[attr-defined]
            raise ValueError("a TIFF whose 0 is white, so its values may be inverted; save it as MINISBLACK")
        if opened.format == "JPEG":
            raise ValueError("JPEG changes labels; save masks as PNG")
        depth = png_depth(content)
        mask = ImageOps.exif_transpose(opened)
        mode = mask.mode
        if depth == 16 and mode in ("RGB", "RGBA", "LA"):
            raise ValueError(f"mode {mode} of 16 bits a channel; {_LABELS_IN_ONE_CHANNEL}")
        if mode in ("LA", "RGBA"):
            if mask.getchannel("A").getextrema() != (255, 255):
                raise ValueError("has transparent pixels, which are not labels; save it without transparency")
            mask = mask.convert(mode[:-1])
        elif mode == "RGBX":
            mask = mask.convert("RGB")
        pixels = np.asarray(mask)
        if mask.mode == "P":
            palette = np.array(mask.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
            return _gif(pixels, palette) if opened.format == "GIF" else MaskFile(pixels, palette)
        if mask.mode == "L" and depth in (2, 4):
            return MaskFile(pixels // (255 // (2**depth - 1)))  # Pillow spreads their values over 0..255
        if mask.mode == "RGB":
            return MaskFile(pixels)
        if mask.mode in ("1", "L") or mask.mode.startswith(("I", "F")):
            return MaskFile(_whole(pixels))
        raise ValueError(f"mode {mode}: neither labels nor RGB; {_LABELS_IN_ONE_CHANNEL}")


def png_depth(content: bytes) -> int | None:
    """Bits a channel of a PNG file; None for another format."""
    return content[24] if content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 24 else None


def _check_single(image: Image.Image) -> None:
    """A file may hold one picture and reduced copies of it (overviews)."""
    frames = getattr(image, "n_frames", 1)
    pages = 1
    for frame in range(1, frames):
        image.seek(frame)
        pages += not (image.format == "TIFF" and image.tag_v2.get(_SUBFILE, 0))  # type: ignore[attr-defined]
    if frames > 1:
        image.seek(0)
    if pages > 1:
        raise ValueError(f"holds {pages} pages; which one is the mask is unknown; save it as one file of one page")


def _gif(indices: np.ndarray, palette: np.ndarray) -> MaskFile:
    """A GIF by its colours: programs write its palette in any order, also for greyscale."""
    colours = palette[indices]
    grey = (colours == colours[..., :1]).all()
    return MaskFile(np.ascontiguousarray(colours[..., 0])) if grey else MaskFile(colours)


def _array(content: bytes) -> np.ndarray:
    array = np.load(io.BytesIO(content), allow_pickle=False)
    shape = array.shape
    if array.ndim == 3 and 1 in (shape[0], shape[2]):
        array = array[0] if shape[0] == 1 else array[..., 0]
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ValueError(f"an array of {array.dtype} {list(shape)}; a mask is whole numbers [height, width]")
    return array


def _whole(values: np.ndarray) -> np.ndarray:
    """uint8 if the values fit, else int64. Raises `ValueError` for fractions and NaN."""
    if values.dtype.kind == "f":
        fractions = ~np.isfinite(values) | (values != np.rint(values)) | (np.abs(values) > 2**31)
        if fractions.any():
            row, column = (int(place[0]) for place in np.nonzero(fractions))
            value = values[row, column]
            raise ValueError(f"value {value:g} at ({row}, {column}): labels are whole numbers")
    fits = values.size == 0 or (values.min() >= 0 and values.max() <= 255)
    return values.astype(np.uint8 if fits else np.int64, copy=False)


@lru_cache(4)
def _colour_table(colours: tuple[tuple[Colour, int], ...]) -> np.ndarray:
    """int16 [2**24]: a colour 0xRRGGBB to its label."""
    table = np.full(1 << 24, ILLEGAL, np.int16)
    for (red, green, blue), label in colours:
        table[red << 16 | green << 8 | blue] = label
    return table


def _colour(entry: np.ndarray) -> Colour:
    red, green, blue = entry.tolist()
    return red, green, blue


def _shown(colour: Colour | None) -> str:
    return "no colour" if colour is None else str(list(colour))
