"""Label maps as images: indexed PNGs, overlays, and strips of image, ground truth and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from harness.data.base import IGNORE_INDEX
from harness.util.files import atomically

Palette = Sequence[tuple[int, int, int]]
IGNORED_COLOUR = (0, 0, 0)


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
    """RGB [H, W, 3] as PNG, atomically. `writer`: the software that the file names, for `written_by`."""
    _save(path, Image.fromarray(picture), writer)


def save_labels(path: Path, labels: np.ndarray, palette: Palette, writer: str = "") -> None:
    """Labels [H, W] as an indexed PNG with the palette, atomically."""
    picture = Image.frombytes("P", labels.shape[::-1], np.ascontiguousarray(labels).tobytes())
    picture.putpalette(_table(palette).reshape(-1).tolist())
    _save(path, picture, writer)


def written_by(path: Path) -> str | None:
    """The software that a PNG names; None for any other file."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _save(path: Path, picture: Image.Image, writer: str) -> None:
    named = PngInfo()
    if writer:
        named.add_text("Software", writer)
    with atomically(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=named)


def _table(palette: Palette) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE_INDEX] = IGNORED_COLOUR
    return table
