"""Image files: decodes them to 8-bit RGB, and deeper ones or ones of other bands as the dataset states."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from harness.data.masks import png_depth

_ORIENTATION, _BITS = 0x0112, 258
_CONVERT = "convert it to 8-bit RGB"
_STATE_RANGE = f"state `range: [lowest, highest]` of its values in dataset.yaml, or {_CONVERT}"
_STATE_BANDS = "state `bands: [red, green, blue]`, counted from 1, in dataset.yaml"


class Bands(NamedTuple):
    """How the channels of an image become 8-bit RGB."""

    range: tuple[float, float] | None = None
    """The values that become 0 and 255; None: the image has 8 bits a channel."""
    bands: tuple[int, ...] | None = None
    """Red, green and blue, or one for grey; counted from 1; None: the image is RGB or grey."""


def read_image(content: bytes, stated: Bands | None = None) -> np.ndarray:
    """uint8 [H, W, 3], RGB. Rotated by the EXIF orientation, as mmcv does.

    `stated` is None for an image that belongs to no dataset. Raises `ValueError` with the remedy for bits or bands of
    which `stated` says nothing.
    """
    if stated is not None and stated != Bands():
        return _from_bands(content, stated)
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        if _is_tiff(content) and stated is not None:
            raise ValueError(f"a TIFF of bands or depth that are not RGB's; {_STATE_BANDS}, and `range`") from None
        raise
    with image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"mode {image.mode}: more than 8 bits a channel; {_CONVERT if stated is None else _STATE_RANGE}"
            )
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def is_deep(content: bytes) -> bool:
    """Whether Pillow reads 8 of the file's 16 bits a channel."""
    if not _is_tiff(content):
        return png_depth(content) == 16
    with Image.open(io.BytesIO(content)) as image:
        return max(image.tag_v2.get(_BITS, (8,))) > 8  # type: ignore[attr-defined]


def orientation(content: bytes) -> int:
    """The EXIF orientation, 1..8; 1 is upright."""
    if content.startswith(b"\x93NUMPY"):
        return 1
    try:
        with Image.open(io.BytesIO(content)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of a file that Pillow does not read, or with broken EXIF
        return 1


def _from_bands(content: bytes, stated: Bands) -> np.ndarray:
    channels = _channels(content)
    count = channels.shape[2]
    if stated.bands is not None:
        if max(stated.bands) > count:
            raise ValueError(f"has {count} bands, but `bands` names band {max(stated.bands)}")
        channels = channels[..., [band - 1 for band in stated.bands]]
    elif count not in (1, 3):
        raise ValueError(f"has {count} bands; {_STATE_BANDS}")
    if channels.dtype == np.uint8:
        if stated.range is not None and stated.range[1] > 255:
            raise ValueError(f"has 8 bits a channel, but `range` is {list(stated.range)}; convert the file, or move it")
        if stated.range is None:
            return np.ascontiguousarray(np.broadcast_to(channels, (*channels.shape[:2], 3)))
    if stated.range is None:
        raise ValueError(f"values of {channels.dtype}; {_STATE_RANGE}")
    lowest, highest = stated.range
    scaled = (np.nan_to_num(channels.astype(np.float64), nan=lowest) - lowest) * (255 / (highest - lowest))
    pixels = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _channels(content: bytes) -> np.ndarray:
    """[H, W, bands] at the file's own depth, upright, in the file's order (RGB for colour)."""
    tiff = _is_tiff(content)
    pixels = _by_tifffile(content) if tiff else None
    if pixels is not None:
        return _turned(pixels, orientation(content))
    import cv2

    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        if tiff:
            raise ValueError("OpenCV cannot read this TIFF; pip install tifffile imagecodecs")
        raise UnidentifiedImageError
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] in (3, 4):  # OpenCV's order is BGR
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    return pixels if tiff else _turned(pixels, orientation(content))  # of a TIFF OpenCV applies the orientation itself


def _by_tifffile(content: bytes) -> np.ndarray | None:
    """[H, W, bands] of a TIFF, not turned; None without tifffile, or where it has no decoder for the compression."""
    try:
        import tifffile  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            pixels = file.series[0].asarray() if file.series[0].ndim == 3 else file.pages[0].asarray()
            axes = file.series[0].axes
    except ValueError:
        return None
    if pixels.ndim == 2:
        return pixels[..., None]
    return pixels if axes.startswith("YX") else np.moveaxis(pixels, 0, 2)


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
