"""Image files: decodes them to 8-bit RGB, and deeper ones or ones of other bands as the dataset states."""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from harness.data.base import RGB, Bands
from harness.data.masks import png_depth

_ORIENTATION = 0x0112
_SIZE, _BITS, _PHOTOMETRIC, _SAMPLES = 256, 258, 262, 277  # TIFF tags
_GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737)
"""TIFF tags of GeoTIFF: pixel scale, tie points, transformation, and the keys of the reference system."""
_MOST_SAMPLES = 6
"""Pillow does not decode a TIFF of more samples per pixel, and logs an error."""
_PLAIN = (1, 2)
"""Photometric interpretations whose samples are bands: grey and RGB."""
_DARK = 64
"""If no value of 16-bit images reaches this in its higher 8 bits, the images use a part of the range only."""
_CONVERT = "convert it to 8-bit RGB"
_DAMAGED = "a damaged TIFF; get the file again"
warnings.filterwarnings("ignore", "Truncated File Read|Corrupt EXIF data", module="PIL")  # an error follows
_STATE_RANGE = f"state `range: [lowest, highest]` of its values in dataset.yaml, or {_CONVERT}"
_STATE_BANDS = "state `bands: [red, green, blue]`, counted from 1, in dataset.yaml"


def read_image(content: bytes, stated: Bands = RGB, trained: bool = False) -> np.ndarray:
    """uint8 [H, W, 3], RGB. Rotated by the EXIF orientation, as mmcv does.

    `trained`: the network is trained already, so `stated` cannot be changed. Raises `ValueError` with the remedy for a
    depth or bands that `stated` does not cover.
    """

    def remedy(statement: str) -> str:
        if not trained:
            return statement
        return _CONVERT if stated == RGB else "convert it to the format of the images that the run was trained on"

    if stated != RGB:
        return _from_bands(content, stated, remedy)
    try:
        if _is_tiff(content) and _tiff_tags(content).get(_SAMPLES, 1) > _MOST_SAMPLES:
            raise UnidentifiedImageError
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        if _is_tiff(content):
            statement = remedy(f"{_STATE_BANDS}, and `range`")
            raise ValueError(f"a TIFF of bands or depth that are not RGB's; {statement}") from None
        raise
    with image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode}: more than 8 bits a channel; {remedy(_STATE_RANGE)}")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def is_deep(content: bytes) -> bool:
    """Whether Pillow reads 8 of the file's 16 bits a channel."""
    if not _is_tiff(content):
        return png_depth(content) == 16
    return max(_tiff_tags(content).get(_BITS, (1,))) > 8


def too_dark(peak: int) -> str | None:
    """The problem with images that `is_deep` if `peak` is their largest value as they were read."""
    if peak >= _DARK:
        return None
    return f"no value above {256 * peak + 255} of 65535: it would be nearly black"


def georeference(content: bytes) -> ImageFileDirectory_v2 | None:
    """The TIFF tags of a GeoTIFF that place its pixels on the Earth; None where it has none, or is turned by EXIF."""
    if not _is_tiff(content):
        return None
    tags, found = _tiff_tags(content), ImageFileDirectory_v2()
    for tag in _GEOREFERENCE:
        if tag in tags:
            found.tagtype[tag] = tags.tagtype[tag]
            found[tag] = tags[tag]
    return found if len(found) and tags.get(_ORIENTATION, 1) == 1 else None


def orientation(content: bytes) -> int:
    """The EXIF orientation, 1..8; 1 is upright."""
    if content.startswith((b"\x93NUMPY", b"{")):
        return 1
    try:
        if _is_tiff(content):  # Pillow logs an error for each one that has too many bands
            return int(_tiff_tags(content).get(_ORIENTATION, 1))
        with Image.open(io.BytesIO(content)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of a file that Pillow does not read, or with broken EXIF
        return 1


def _from_bands(content: bytes, stated: Bands, remedy: Callable[[str], str]) -> np.ndarray:
    channels = _channels(content)
    count = channels.shape[2]
    if stated.bands is not None:
        if max(stated.bands) > count:
            raise ValueError(f"has {count} bands, but `bands` names band {max(stated.bands)}")
        channels = channels[..., [band - 1 for band in stated.bands]]
    elif count not in (1, 3):
        raise ValueError(f"has {count} bands; {remedy(_STATE_BANDS)}")
    if channels.dtype == np.uint8:
        if stated.range is not None and stated.range[1] > 255:
            raise ValueError(f"has 8 bits a channel, but `range` is {list(stated.range)}; convert the file, or move it")
        if stated.range is None:
            return np.ascontiguousarray(np.broadcast_to(channels, (*channels.shape[:2], 3)))
    if stated.range is None:
        raise ValueError(f"values of {channels.dtype}; {remedy(_STATE_RANGE)}")
    lowest, highest = stated.range
    pixels = np.empty((*channels.shape[:2], 3), np.uint8)
    for row, values in enumerate(channels):  # by row: as float64, a large image takes gigabytes
        scaled = (np.nan_to_num(values.astype(np.float64), nan=lowest) - lowest) * (255 / (highest - lowest))
        pixels[row] = np.rint(np.clip(scaled, 0, 255))
    return pixels


def _channels(content: bytes) -> np.ndarray:
    """[H, W, bands] at the file's own depth, upright, in the file's order (RGB for colour)."""
    tags = _tiff_tags(content) if _is_tiff(content) else None
    if tags is not None:
        if tags.get(_PHOTOMETRIC) not in _PLAIN:
            raise ValueError(f"a TIFF of palette or YCbCr colours, which are not bands; {_CONVERT}")
        pixels = _by_tifffile(content)
        if pixels is not None:
            return _turned(pixels, orientation(content))
    pixels = by_opencv(content)
    if pixels is None and tags is None:
        raise UnidentifiedImageError
    if pixels is not None and pixels.ndim == 2:
        pixels = pixels[..., None]
    if tags is not None:
        # OpenCV reads other TIFFs than grey and RGB as one band, or as 8 bits.
        expected = tags.get(_SAMPLES, 1), max(tags.get(_BITS, (1,)))
        if pixels is None or (pixels.shape[2], 8 * pixels.itemsize) != expected:
            raise ValueError(f"a TIFF of {expected[0]} bands of {expected[1]} bits; pip install tifffile imagecodecs")
    assert pixels is not None
    if pixels.shape[2] in (3, 4):  # OpenCV's order is BGR
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    return pixels if tags is not None else _turned(pixels, orientation(content))  # OpenCV turns a TIFF itself


def by_opencv(content: bytes) -> np.ndarray | None:
    """[H, W] or [H, W, channels] at the file's own depth, channels in BGR order; None where OpenCV does not read it."""
    import cv2

    # OpenCV prints a line for each tag of a GeoTIFF, and for files that it does not read.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) if content else None


def _by_tifffile(content: bytes) -> np.ndarray | None:
    """[H, W, bands] of a TIFF, not turned; None without tifffile, or where it has no decoder for the compression."""
    try:
        import tifffile  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what is damaged before it raises an error
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            first = file.series[0] if file.series[0].ndim == 3 else file.pages[0]
            pixels, axes = first.asarray(), first.axes
    except ValueError as error:
        if re.search("imagecodecs|not supported", str(error)):
            return None
        raise ValueError(_DAMAGED) from error
    if pixels.ndim == 2:
        return pixels[..., None]
    return pixels if axes.startswith("YX") else np.moveaxis(pixels, 0, 2)


def _tiff_tags(content: bytes) -> ImageFileDirectory_v2:
    """The tags of the first page, also of a file that Pillow cannot decode. Raises `ValueError` if there are none."""
    header = content[: 16 if content[2:4] in (b"+\0", b"\0+") else 8]
    try:
        tags, file = ImageFileDirectory_v2(header), io.BytesIO(content)
        file.seek(tags.next)
        tags.load(file)
    except struct.error as error:
        raise ValueError(_DAMAGED) from error
    if _SIZE not in tags:
        raise ValueError(_DAMAGED)
    return tags


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright, as `ImageOps.exif_transpose`."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _is_tiff(content: bytes) -> bool:
    return content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
