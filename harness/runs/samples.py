"""Label maps as images: indexed PNGs, overlays, and strips of image, ground truth and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from harness.data.base import IGNORE_INDEX
from harness.util.files import atomically

Palette = Sequence[tuple[int, int, int]]
IGNORED_COLOUR = (0, 0, 0)


def colour(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """uint8 labels [H, W] -> uint8 RGB [H, W, 3]; ignored pixels are black."""
    return _table(palette)[labels]


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette, opacity: float = 0.5) -> np.ndarray:
    """The labels' colours over a uint8 image [H, W, 3]."""
    return np.round((1 - opacity) * image + opacity * colour(labels, palette)).astype(np.uint8)


def strip(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, palette: Palette) -> np.ndarray:
    """Image, ground truth and prediction side by side, separated by a white line."""
    line = np.full((image.shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([image, line, colour(truth, palette), line, colour(prediction, palette)], axis=1)


def save_picture(path: Path, picture: np.ndarray) -> None:
    """RGB [H, W, 3] as PNG, atomically."""
    with atomically(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def save_labels(path: Path, labels: np.ndarray, palette: Palette) -> None:
    """Labels [H, W] as an indexed PNG with the palette, atomically."""
    picture = Image.fromarray(labels, mode="L").convert("P")
    picture.putdata(labels.reshape(-1).tolist())
    picture.putpalette(_table(palette).reshape(-1).tolist())
    with atomically(path) as temporary:
        picture.save(temporary, format="PNG")


def _table(palette: Palette) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE_INDEX] = IGNORED_COLOUR
    return table
