"""The contact sheet of a dataset: some images of each split, their labels laid over them, and the classes' colours."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness.cli.folders import check_writable, writing
from harness.data.base import IGNORE_INDEX, SPLITS, Sample, SegmentationDataset, Split
from harness.errors import UserError
from harness.runs.samples import IGNORED_COLOUR, overlay, save_picture

_ROWS = 4
"""Images per split."""
_WIDTH, _HEIGHT = 360, 300
"""The largest size of an image, in pixels."""
_GAP, _LINE, _SWATCH = 8, 18, 12
_PAPER, _INK = (255, 255, 255), (0, 0, 0)


def check_sheet(path: Path) -> None:
    """Raises `UserError` for a file that exists or is not named .png, or whose folder cannot be written to."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--sheet {path}: name a file that ends in .png")
    if path.exists() or path.is_symlink():
        raise UserError(f"--sheet {path}: exists, and is not overwritten; choose another file")
    check_writable("--sheet", path.parent)


def write_sheet(dataset: SegmentationDataset, path: Path) -> None:
    """Write the sheet: a column for each split, and a legend. Samples are evenly spaced in the order of names."""
    columns = [_column(dataset, split) for split in SPLITS if dataset.samples(split)]
    height = max(column.height for column in columns)
    legend = _legend(dataset, sum(column.width + _GAP for column in columns))
    sheet = Image.new("RGB", (legend.width, height + legend.height), _PAPER)
    left = 0
    for column in columns:
        sheet.paste(column, (left, 0))
        left += column.width + _GAP
    sheet.paste(legend, (0, height))
    with writing(f"--sheet {path}"):
        save_picture(path, np.asarray(sheet))


def _column(dataset: SegmentationDataset, split: Split) -> Image.Image:
    samples = dataset.samples(split)
    chosen = [samples[round(place)] for place in np.linspace(0, len(samples) - 1, min(_ROWS, len(samples)))]
    rows = [_row(dataset, sample) for sample in chosen]
    width, height = max(row.width for row in rows), sum(row.height for row in rows)
    column = Image.new("RGB", (width, height + _LINE), _PAPER)
    ImageDraw.Draw(column).text((_GAP, 2), f"{split}: {len(samples)} images", _INK, _font())
    top = _LINE
    for row in rows:
        column.paste(row, (0, top))
        top += row.height
    return column


def _row(dataset: SegmentationDataset, sample: Sample) -> Image.Image:
    """Image and overlay with the sample's name."""
    image, mask = dataset.load(sample)
    # Scaled after the colours are laid over it, so that thin objects do not break up.
    pictures = [_fitted(pixels) for pixels in (image, overlay(image, mask, dataset.palette, opacity=0.6))]
    width, height = pictures[0].size
    name = sample.name.partition("/")[2]
    widest = max(2 * width + 3 * _GAP, round(_font().getlength(name)) + 2 * _GAP)
    row = Image.new("RGB", (widest, height + _LINE + _GAP), _PAPER)
    ImageDraw.Draw(row).text((_GAP, 2), name, _INK, _font())
    for left, picture in zip((_GAP, width + 2 * _GAP), pictures, strict=True):
        row.paste(picture, (left, _LINE))
    return row


def _fitted(pixels: np.ndarray) -> Image.Image:
    """At most `_WIDTH` x `_HEIGHT`; small images are enlarged by whole factors, so that their pixels can be seen."""
    height, width = pixels.shape[:2]
    factor = min(_WIDTH / width, _HEIGHT / height)
    factor = int(factor) if factor >= 1 else factor
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BOX)


def _legend(dataset: SegmentationDataset, width: int) -> Image.Image:
    """A swatch and a name for each class, wrapped at `width`, or at the longest entry if that is wider."""
    entries = [
        (f"{label} {name}", colour)
        for label, (name, colour) in enumerate(zip(dataset.classes, dataset.palette, strict=True))
    ]
    entries.append((f"{IGNORE_INDEX} ignored", IGNORED_COLOUR))
    widths = [_SWATCH + 4 + round(_font().getlength(text)) + 2 * _GAP for text, _ in entries]
    width = max(width, *(one + _GAP for one in widths))
    places, left, top = [], _GAP, _GAP
    for one in widths:
        if left + one > width:
            left, top = _GAP, top + _LINE
        places.append((left, top))
        left += one
    legend = Image.new("RGB", (width, top + _LINE + _GAP), _PAPER)
    draw = ImageDraw.Draw(legend)
    for (text, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y, x + _SWATCH, y + _SWATCH), fill=tuple(colour), outline=_INK)
        draw.text((x + _SWATCH + 4, y), text, _INK, _font())
    return legend


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's: unlike Pillow's own, it covers most European languages."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 11)
