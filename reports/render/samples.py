"""What a method does to single images: the pictures that runs keep, small, and where it helps or hurts most."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from PIL import Image

from harness.errors import UserError
from harness.runs.folder import RunFolder
from reports.analysis.statistics import figure
from reports.read.collect import Collected

WIDTH = 176
"""Of a picture on the page, pixels; smaller ones stay as they are."""

STRIPS = 400
"""How many sample strips are opened at most: large ones take a while each."""

EXTREMES = 4
"""How many images a method helps most with, and hurts most."""

_LINE = 4
"""Width of the white line between the parts of a strip, as `harness.runs.samples.strip` draws it."""


@dataclass
class ImageGallery:
    """Pictures as data URIs, each once, up to so many characters in all."""

    room: int
    pictures: list[str] = field(default_factory=list)
    samples: list[dict[str, str | int]] = field(default_factory=list)
    """Images that some run kept: setting, name, and the places of image and truth in `pictures`."""
    predictions: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By fingerprint: place in `samples`, place in `pictures`."""

    def add(self, uris: list[str]) -> list[int] | None:
        """The places of the pictures, or None where there is no room for all of them."""
        size = sum(map(len, uris))
        if size > self.room:
            return None
        self.room -= size
        self.pictures += uris
        return list(range(len(self.pictures) - len(uris), len(self.pictures)))


def collect_pictures(collected: Collected, runs: pd.DataFrame, room: int) -> ImageGallery:
    """The samples of finished runs while there is room, a seed of every method and setting before further ones."""
    album = ImageGallery(room)
    known: dict[tuple[str, str], int] = {}
    order = runs.assign(turn=runs.groupby(["setting", "label"]).cumcount()).sort_values("turn", kind="stable")
    opened = 0
    for run in order.itertuples():
        for path in sorted(RunFolder(collected.root / run.fingerprint).samples_path.glob("*.png")):
            if opened == STRIPS:
                return album
            opened += 1
            parts = _parts(path)
            if parts is None:
                continue
            key = run.setting, path.stem
            if key not in known:
                places = album.add([_photograph(parts[0]), _labels(parts[1])])
                if places is None:
                    return album
                known[key] = len(album.samples)
                album.samples.append(
                    {"setting": run.setting, "name": path.stem, "image": places[0], "truth": places[1]}
                )
            places = album.add([_labels(parts[2])])
            if places is None:
                return album
            album.predictions.setdefault(run.fingerprint, []).append((known[key], places[0]))
    return album


def extremes(collected: Collected, runs: pd.DataFrame, reference: str) -> Iterator[tuple[str, str, dict]]:
    """Per setting and label: the images with the largest gain and loss against the reference.

    Yields setting, label and {"helps": [(name, mIoU, mIoU of the reference)], "hurts": [...]}; mIoU is of the single
    image, the mean over the seeds.
    """
    for setting, here in runs.groupby("setting", sort=True):
        scores = {label: _image_scores(collected, group.fingerprint) for label, group in here.groupby("label")}
        base = scores.pop(reference, pd.Series(dtype=float))
        for label, own in scores.items():
            both = pd.DataFrame({"own": own, "base": base}).dropna()
            gain = (both.own - both.base).sort_values(kind="stable")
            if gain.empty:
                continue
            yield (
                setting,
                label,
                {
                    "helps": _told(both.loc[gain[gain > 0].index[::-1][:EXTREMES]]),
                    "hurts": _told(both.loc[gain[gain < 0].index[:EXTREMES]]),
                },
            )


def _told(rows: pd.DataFrame) -> list[tuple[str, float, float]]:
    return [(str(name), round(row.own, 6), round(row.base, 6)) for name, row in rows.iterrows()]


def _image_scores(collected: Collected, fingerprints: pd.Series) -> pd.Series:
    """mIoU of each image, by name: over the classes that occur in it, mean over the runs whose matrices can be read."""
    scores = []
    for fingerprint in fingerprints:
        try:
            names, counts = collected.counts(fingerprint)
        except UserError:
            continue
        scores.append(pd.Series(figure(counts), index=names))
    return pd.concat(scores, axis=1).mean(axis=1) if scores else pd.Series(dtype=float)


def _parts(path: Path) -> list[Image.Image] | None:
    """Image, truth and prediction of a strip; None where it cannot be read or is none of ours."""
    try:
        with Image.open(path) as opened:
            strip = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    width, left = divmod(strip.width - 2 * _LINE, 3)
    if left or width < 1:
        return None
    return [strip.crop((at, 0, at + width, strip.height)) for at in (n * (width + _LINE) for n in range(3))]


def _smaller(picture: Image.Image, how: Image.Resampling) -> Image.Image:
    if picture.width <= WIDTH:
        return picture
    return picture.resize((WIDTH, max(1, round(picture.height * WIDTH / picture.width))), how)


def _photograph(picture: Image.Image) -> str:
    written = io.BytesIO()
    _smaller(picture, Image.Resampling.LANCZOS).save(written, "JPEG", quality=82, optimize=True)
    return _uri("jpeg", written)


def _labels(picture: Image.Image) -> str:
    """A label map keeps its few colours as they are: an indexed PNG, sampled and not blended."""
    written = io.BytesIO()
    small = _smaller(picture, Image.Resampling.NEAREST)
    small.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(written, "PNG", optimize=True)
    return _uri("png", written)


def _uri(kind: str, written: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"
