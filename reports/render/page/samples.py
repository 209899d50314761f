"""Single images on the page: thumbnails of each run's samples, and the images on which a method differs most."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import pandas as pd
from PIL import Image

from harness.runs.folder import RunFolder
from reports.read.collect import Collected
from reports.read.frames import rows_of

WIDTH = 176
"""Width of a picture on the page, in pixels; smaller ones are not enlarged."""

STRIPS = 400
"""The largest number of sample files to open: large ones take time."""

EXTREMES = 4
"""How many images with the largest gain, and with the largest loss, are listed."""

_LINE = 4
"""Width of the white line between the parts of a strip, as `harness.runs.samples.strip` draws it."""


ImageScores = tuple[str, float, float]
"""An image's name, its mIoU, and the mIoU of the reference."""


class PageSample(TypedDict):
    """An image that some run has a sample of. Image and ground truth are indices of `ImageGallery.pictures`."""

    setting: str
    name: str
    image: int
    truth: int


@dataclass
class ImageGallery:
    """Pictures as data URIs, each once, within the size limit."""

    room: int
    """Characters that are left."""
    pictures: list[str] = field(default_factory=list)
    samples: list[PageSample] = field(default_factory=list)
    predictions: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By fingerprint: index in `samples`, index in `pictures`."""

    def add(self, uris: list[str]) -> list[int] | None:
        """The indices of the pictures, or None if not all of them fit."""
        size = sum(map(len, uris))
        if size > self.room:
            return None
        self.room -= size
        self.pictures += uris
        return list(range(len(self.pictures) - len(uris), len(self.pictures)))


def collect_pictures(collected: Collected, room: int) -> ImageGallery:
    """The samples of finished runs, within the size limit: one seed of every method and setting comes first."""
    runs = collected.finished
    gallery = ImageGallery(room)
    indices: dict[tuple[str, str], int] = {}
    order = runs.assign(turn=runs.groupby(["setting", "label"]).cumcount()).sort_values("turn", kind="stable")
    opened = 0
    for run in rows_of(order):
        for path in sorted(RunFolder(collected.root / run.fingerprint).samples_path.glob("*.png")):
            if opened == STRIPS:
                return gallery
            opened += 1
            parts = _parts(path)
            if parts is None:
                continue
            key = run.setting, path.stem
            if key not in indices:
                added = gallery.add([_photograph(parts[0]), _labels(parts[1])])
                if added is None:
                    return gallery
                indices[key] = len(gallery.samples)
                gallery.samples.append(
                    {"setting": run.setting, "name": path.stem, "image": added[0], "truth": added[1]}
                )
            added = gallery.add([_labels(parts[2])])
            if added is None:
                return gallery
            gallery.predictions.setdefault(run.fingerprint, []).append((indices[key], added[0]))
    return gallery


def extremes(images: pd.DataFrame, reference: str) -> Iterator[tuple[str, str, dict[str, list[ImageScores]]]]:
    """Per setting and label: the images with the largest gain and the largest loss compared with the reference.

    `images`: as `Comparison.images`. Yields setting, label, and the images under "gains" and "losses".
    """
    for setting, here in images.groupby("setting", sort=True):
        scores = here.pivot(index="image", columns="label", values="miou")
        for label in scores.columns.drop(reference) if reference in scores else ():
            both = scores[[label, reference]].dropna().set_axis(["own", "base"], axis="columns")
            gain = (both.own - both.base).sort_values(kind="stable")
            if gain.empty:
                continue
            yield (
                str(setting),
                label,
                {
                    "gains": _image_list(both.loc[gain[gain > 0].index[::-1][:EXTREMES]]),
                    "losses": _image_list(both.loc[gain[gain < 0].index[:EXTREMES]]),
                },
            )


def _image_list(rows: pd.DataFrame) -> list[ImageScores]:
    return [(str(name), round(row.own, 6), round(row.base, 6)) for name, row in rows.iterrows()]


def _parts(path: Path) -> list[Image.Image] | None:
    """Image, ground truth and prediction of a sample file; None if it cannot be read or is something else."""
    try:
        with Image.open(path) as opened:
            strip = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    width, left = divmod(strip.width - 2 * _LINE, 3)
    if left or width < 1:
        return None
    return [strip.crop((at, 0, at + width, strip.height)) for at in (n * (width + _LINE) for n in range(3))]


def _smaller(picture: Image.Image, filter_: Image.Resampling) -> Image.Image:
    if picture.width <= WIDTH:
        return picture
    return picture.resize((WIDTH, max(1, round(picture.height * WIDTH / picture.width))), filter_)


def _photograph(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    _smaller(picture, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=82, optimize=True)
    return _uri("jpeg", buffer)


def _labels(picture: Image.Image) -> str:
    """A label map as an indexed PNG: nearest-neighbour sampling keeps its colours."""
    buffer = io.BytesIO()
    small = _smaller(picture, Image.Resampling.NEAREST)
    small.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(buffer, "PNG", optimize=True)
    return _uri("png", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
