"""Images and masks of a few pixels, the same on every call."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def picture(seed: int = 0, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def labels(seed: int = 0, classes: int = 3, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, (height, width), dtype=np.uint8)


def tiff(bands: np.ndarray) -> bytes:
    """An uncompressed TIFF of [H, W, bands] whose bands are not named, as GDAL writes it."""
    height, width, count = bands.shape
    kind = {"u": 1, "i": 2, "f": 3}[bands.dtype.kind]
    bits = 8 * bands.dtype.itemsize
    data = bands.astype(bands.dtype.newbyteorder("<")).tobytes()
    end = 8 + 2 + 12 * 11 + 4
    lists = struct.pack(f"<{count}H", *[bits] * count) + struct.pack(f"<{count}H", *[kind] * count)
    extra = struct.pack(f"<{max(count - 1, 1)}H", *[0] * max(count - 1, 1))

    def short(tag: int, value: int) -> bytes:
        return struct.pack("<HHIHH", tag, 3, 1, value, 0)

    def many(tag: int, number: int, values: bytes, offset: int) -> bytes:
        if len(values) <= 4:
            return struct.pack("<HHI", tag, 3, number) + values.ljust(4, b"\0")
        return struct.pack("<HHII", tag, 3, number, offset)

    offset = end + len(lists) + len(extra)
    entries = [
        short(256, width),
        short(257, height),
        many(258, count, lists[: 2 * count], end),
        short(259, 1),
        short(262, 1),
        struct.pack("<HHII", 273, 4, 1, offset),
        short(277, count),
        short(278, height),
        struct.pack("<HHII", 279, 4, 1, len(data)),
        many(338, max(count - 1, 1), extra, end + len(lists)),
        many(339, count, lists[2 * count :], end + 2 * count),
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return head + lists + extra + data
