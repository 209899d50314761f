"""Before training: the sizes of the parts, splits that are not independent, and crops that do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from harness.data.augmentation import prepare
from harness.data.base import WorkingSizes, working_size
from harness.data.fit import check_fit, describe_parts, warnings
from harness.data.folder import FolderDataset
from harness.spec import Budget
from tests.support.tiny_files import labels, picture, save


def budget(**fields) -> Budget:
    return Budget(**{"name": "test", "steps": 1, "batch_size": 1, "crop": (12, 16), **fields})


def dataset(
    root: Path, extra: str = "", sizes: tuple[tuple[int, int], ...] = ((12, 16),) * 3, **splits: str
) -> FolderDataset:
    """Each split by its names, `train="a1 a2 b1"`; images take the sizes in turn."""
    splits = splits or {"train": "a1 a2 b1", "test": "c1 c2"}
    for offset, (split, names) in enumerate(splits.items()):
        for number, name in enumerate(names.split()):
            height, width = sizes[number % len(sizes)]
            save(root / "images" / split / f"{name}.png", picture(100 * offset + number, height, width))
            save(root / "masks" / split / f"{name}.png", labels(number, height=height, width=width))
    (root / "dataset.yaml").write_text(f"name: d\nclasses: [a, b, c]\n{extra}")
    return FolderDataset(root / "dataset.yaml", root / "cache")


GROUP = "group: '^([a-z])'\n"


def test_sizes_of_the_parts_name_the_dev_part_that_is_held_out(tmp_path):
    line = describe_parts(dataset(tmp_path, GROUP), 0.2)
    # sha256 of "b" begins with 3e, of "a" with ca.
    assert (
        line
        == "d: train 3 images in 2 groups; dev 1 image in 1 group held out of train by group; test 2 images in 1 group"
    )


def test_sizes_of_the_parts_name_the_share_that_is_drawn(tmp_path):
    line = describe_parts(dataset(tmp_path, GROUP), 0.2, 0.25)
    assert line.startswith("d: train 3 images in 2 groups, of which each seed draws 25 % of the images; dev 1 image")


def test_sizes_of_the_parts_with_a_dev_split(tmp_path):
    opened = dataset(tmp_path, "splits: {dev: dev}\n" + GROUP, train="a1 a2", dev="b1 c1", test="d1")
    assert (
        describe_parts(opened, 0.2) == "d: train 2 images in 1 group; dev 2 images in 2 groups; test 1 image in 1 group"
    )


def test_sizes_of_the_parts_without_a_dev_part(tmp_path):
    assert "; dev none, since train is one group; " in describe_parts(
        dataset(tmp_path, GROUP, train="a1", test="b1"), 0.2
    )


def test_group_in_train_and_test_is_a_warning(tmp_path):
    opened = dataset(tmp_path, GROUP, train="a1 b1 c1", test="b2 b3 c2 d1")
    assert warnings(opened, budget()) == [
        "d: train and test share 2 groups (b, c): 3 of 4 images of test may resemble images of train"
    ]
    assert warnings(dataset(tmp_path / "apart", GROUP, train="a1 b1", test="c1"), budget()) == []


def test_dev_split_that_shares_groups_is_a_warning(tmp_path):
    opened = dataset(tmp_path, "splits: {dev: dev}\n" + GROUP, train="a1", dev="a2 b1", test="b2")
    first, second = warnings(opened, budget())
    assert first.startswith("d: train and dev share 1 group (a): 1 of 2 images of dev")
    assert second.startswith("d: dev and test share 1 group (b): 1 of 1 images of test")


def test_image_file_that_two_splits_share_under_two_names_is_a_warning(tmp_path):
    dataset(tmp_path, train="a1 a2 a3", test="b1 b2")
    for name, original in (("b1", "a2"), ("b2", "a3")):
        shutil.copy(tmp_path / f"images/train/{original}.png", tmp_path / f"images/test/{name}.png")
    for _ in range(2):  # the second time from the cache
        assert warnings(FolderDataset(tmp_path / "dataset.yaml", tmp_path / "cache"), budget()) == [
            "d: train and test share 2 equal image files, such as train/a2 and test/b1"
        ]


@pytest.mark.parametrize(
    ("crop", "scale", "covered"),
    [
        ((6, 8), "", None),
        ((5, 8), "", "42 % of the images' height, 5 of 12 pixels, at"),
        ((6, 7), "", "44 % of the images' width, 7 of 16 pixels, at"),
        ((12, 16), "scale: [64, 48]\n", "25 % of the images' height, 12 of 48 pixels and 25 % of the images' width"),
        # A scale bounds the images: of [2048, 24] they reach the short side, and are 24x32.
        ((12, 16), "scale: [2048, 24]\n", None),
    ],
)
def test_crop_below_half_of_a_working_side_is_a_warning(tmp_path, crop, scale, covered):
    warned = warnings(dataset(tmp_path, scale), budget(crop=crop))
    assert len(warned) == (covered is not None)
    assert covered is None or covered in warned[0]


def test_working_size_is_that_of_evaluation():
    for size in ((12, 16), (17, 5), (30, 30), (7, 64)):
        for scale in ((64, 48), (2048, 24), (9, 9)):
            shape = prepare(np.zeros((*size, 3), np.uint8), scale, (0, 0, 0), (1, 1, 1)).shape
            assert shape[1:] == working_size(size, scale)


def test_images_of_many_sizes_are_compared_by_their_median(tmp_path):
    opened = dataset(tmp_path, sizes=((10, 20), (30, 16), (12, 40)), train="a b c", test="a")
    assert opened.working_sizes == WorkingSizes((12, 20), (30, 40))
    again = FolderDataset(tmp_path / "dataset.yaml", tmp_path / "cache")
    assert again.working_sizes == opened.working_sizes
    assert "25 % of the images' height, 3 of 12 pixels (median)" in warnings(opened, budget(crop=(3, 16)))[0]


def test_window_larger_than_every_image_is_an_error(tmp_path, refusal):
    opened = dataset(tmp_path, "scale: [32, 24]\n")
    for crop, part in (((24, 32), "report"), ((24, 16), "dev")):
        check_fit(opened, budget(crop=crop, evaluation="slide", stride=(8, 8)), part)
    check_fit(opened, budget(crop=(25, 32)), "report")  # whole images need no windows
    message = refusal(lambda: check_fit(opened, budget(crop=(25, 32), evaluation="slide", stride=(8, 8)), "report"))
    assert message == (
        "budget test: the windows of `evaluation: slide`, [25, 32], are larger than the images of d, at most "
        "[24, 32] at working size; use a smaller crop, or `evaluation: whole`"
    )


def test_one_group_is_an_error_before_a_dev_run_alone(tmp_path, refusal):
    opened = dataset(tmp_path, GROUP, train="a1 a2", test="b1")
    check_fit(opened, budget(), "report")
    message = refusal(lambda: check_fit(opened, budget(), "dev"))
    assert message.startswith(
        f"{tmp_path}/dataset.yaml: dataset: d: dev cannot be held out of train, which is one group (a);"
    )
