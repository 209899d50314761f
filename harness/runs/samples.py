"""Label maps as images: indexed PNGs and TIFFs, overlays, and strips of image, ground truth and prediction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from harness.data.base import IGNORE_INDEX
from harness.util.files import atomically

Palette = Sequence[tuple[int, int, int]]
IGNORED_COLOUR = (0, 0, 0)
_SOFTWARE = 305  # TIFF tag


def colour(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """uint8 labels [H, W] -> uint8 RGB [H, W, 3]; ignored pixels are black."""
    return _table(palette)[labels]


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette, opacity: float = 0.5) -> np.ndarray:
    """The labels' colours over a uint8 image [H, W, 3]. Row by row: as floats, a large image takes gigabytes."""
    mixed = np.empty_like(image)
    for row, pixels in enumerate(image):
        mixed[row] = np.round((1 - opacity) * pixels + opacity * colour(labels[row], palette))
    return mixed


def strip(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, palette: Palette) -> np.ndarray:
    """Image, ground truth and prediction side by side, separated by a white line."""
    line = np.full((image.shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([image, line, colour(truth, palette), line, colour(prediction, palette)], axis=1)


def save_picture(path: Path, picture: np.ndarray, writer: str = "") -> None:
    """RGB [H, W, 3] as PNG, atomically. `writer`: the software that the file names, with a digest of its pixels."""
    _save(path, Image.fromarray(picture), writer)


def save_labels(
    path: Path,
    labels: np.ndarray,
    palette: Palette,
    writer: str = "",
    codes: Sequence[int] | None = None,
    tags: ImageFileDirectory_v2 | None = None,
) -> None:
    """Labels [H, W] as an indexed PNG with the palette, or a TIFF by the path's suffix, atomically.

    `codes`: the value 0..65535 of each class in the file, in place of its index; if one is above 255, the file has 16
    bits and no colours. `tags`: further tags of a TIFF.
    """
    values, table = labels, _table(palette)
    if codes is not None:
        values = np.array(codes, np.uint8 if max(codes) <= 255 else np.uint16)[labels]
    if values.dtype == np.uint8:
        picture = Image.frombytes("P", values.shape[::-1], np.ascontiguousarray(values).tobytes())
        if codes is not None:
            table[list(codes)] = palette
        picture.putpalette(table.reshape(-1).tolist())
    else:
        picture = Image.fromarray(values)
    _save(path, picture, writer, tags)


def is_written_by(path: Path, writer: str, unchanged: bool = False) -> bool:
    """Whether a PNG or TIFF names that software; `unchanged`: and has the pixels that it wrote."""
    try:
        with Image.open(path) as picture:
            tags = picture.tag_v2 if isinstance(picture, TiffImageFile) else {}
            named = str(tags.get(_SOFTWARE) or picture.info.get("Software") or "")
            return named == _signature(picture, writer) if unchanged else named.startswith(writer)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _signature(picture: Image.Image, writer: str) -> str:
    return f"{writer} {hashlib.sha256(np.asarray(picture).tobytes()).hexdigest()[:16]}"


def _save(path: Path, picture: Image.Image, writer: str, tags: ImageFileDirectory_v2 | None = None) -> None:
    with atomically(path) as temporary:
        if path.suffix == ".tif":
            tags = ImageFileDirectory_v2() if tags is None else tags
            tags[_SOFTWARE] = _signature(picture, writer)
            picture.save(temporary, format="TIFF", tiffinfo=tags, compression="tiff_adobe_deflate")
            return
        named = PngInfo()
        if writer:
            named.add_text("Software", _signature(picture, writer))
        picture.save(temporary, format="PNG", pnginfo=named)


def _table(palette: Palette) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE_INDEX] = IGNORED_COLOUR
    return table
