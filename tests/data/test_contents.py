"""What is odd about the files: an error where reading would be wrong, a warning where it may be intended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.data.fit import warnings
from harness.data.folder import FolderDataset
from harness.spec import Budget
from tests.support.tiny_files import picture, save

BUDGET = Budget(name="test", steps=1, batch_size=1, crop=(4, 4))
TWO = "classes: [back, fore]\n"


def dataset(root: Path, text: str, train: Sequence[list[int]], test: Sequence[list[int]]) -> FolderDataset:
    """Each mask is 4 pixels high and holds the values in its columns."""
    for split, masks in (("train", train), ("test", test)):
        for number, values in enumerate(masks):
            mask = np.tile(np.array(values, np.uint8), (4, 1))
            save(root / "images" / split / f"{number}.png", picture(len(split) * 100 + number, *mask.shape))
            save(root / "masks" / split / f"{number}.png", mask)
    (root / "dataset.yaml").write_text(f"name: d\n{text}")
    return FolderDataset(root / "dataset.yaml", root / "cache")


def warned(opened: FolderDataset) -> list[str]:
    return warnings(opened, BUDGET)


def test_complete_dataset_has_no_warnings(tmp_path):
    assert warned(dataset(tmp_path, TWO, [[0, 1, 1, 255]], [[0, 0, 1, 1]])) == []


def test_absent_classes_are_named_by_split_once_and_from_the_cache(tmp_path):
    dataset(tmp_path, "classes: [a, b, c, d, e, f, g]\n", [[0, 1, 2, 3, 4]], [[0, 5, 0, 5, 0]])
    for _ in range(2):
        assert warned(FolderDataset(tmp_path / "dataset.yaml", tmp_path / "cache")) == [
            "d: class f never occurs in train: not trained",
            "d: classes b, c, d and 1 more never occur in test: not scored",
            "d: class g never occurs in any mask",
        ]


def test_share_of_ignored_pixels_above_half_is_a_warning(tmp_path):
    opened = dataset(tmp_path, TWO, [[0, 1, 255, 255]], [[0, 1, 255, 255, 255]])
    assert warned(opened) == ["d: 60 % of the pixels of test are ignored"]


def test_pixels_of_classes_and_ignored_ones_are_counted(tmp_path):
    opened = dataset(tmp_path, TWO, [[0, 1, 1, 255], [0, 0, 1, 1]], [[0, 0, 1, 255]])
    assert [opened.class_pixels(split) for split in ("train", "dev", "test")] == [[12, 16, 4], [0, 0, 0], [8, 4, 4]]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([[0, 255]], [[0, 255]], "only class 0; labels are class indices; if 255 is a class, "
         "write `classes: {0: back, 255: fore}`"),
        ([[0, 1]], [[0, 255]], "0 and 255, as 1 of 2 masks (test); others hold 0 and 1, so 255 seems to be class 1"),
        ([[0, 1], [0, 255]], [[0, 1]], "holds 0 and 255, as 1 of 3 masks (train)"),
        ([[0, 1]], [[255, 255]], "the masks of test hold only ignored pixels"),
    ],
)  # fmt: skip
def test_binary_masks_of_255_are_an_error(tmp_path, refusal, train, test, message):
    opened = dataset(tmp_path, TWO, train, test)
    assert message in refusal(lambda: opened.digest)


def test_stated_255_is_ignored_and_a_class_of_255_is_read(tmp_path):
    ignored = dataset(tmp_path / "a", TWO + "ignore: [255]\n", [[0, 1], [0, 255]], [[0, 1]])
    assert ignored.class_pixels("train") == [8, 4, 4]
    read = dataset(tmp_path / "b", "classes: {0: back, 255: fore}\n", [[0, 255]], [[0, 255]])
    assert read.class_pixels("test") == [4, 4, 0]
    assert warned(ignored) == warned(read) == []


def test_stating_255_does_not_change_the_digest(tmp_path):
    digests = {dataset(tmp_path, TWO + more, [[0, 1]], [[0, 1, 255]]).digest for more in ("", "ignore: [255]\n")}
    assert len(digests) == 1


def test_warns_if_only_some_masks_lack_the_value_between_0_and_255(tmp_path):
    assert warned(dataset(tmp_path, TWO, [[0, 1, 255], [0, 0, 255]], [[0, 1]])) == [
        "d: 1 mask (train/1 first) hold 0 and 255 but not 1; 255 is ignored: state `ignore: [255]` if that is right"
    ]


def test_255_in_place_of_the_last_class_is_a_warning(tmp_path):
    lines = warned(dataset(tmp_path, "classes: [a, b, c]\n", [[0, 1, 255]], [[0, 1, 255]]))
    assert lines == [
        "d: class c never occurs in any mask",
        "d: 255 is ignored and class c never occurs; if 255 is a class, write `classes: {0: a, 1: b, 255: c}`",
    ]


@pytest.mark.parametrize(
    ("masks", "hint"),
    [
        ([[0, 1, 2, 255]], "such labels are in 2 of 2 masks; if 0 is unlabelled, write `reduce_zero_label: true`"),
        ([[1, 2]], "if the classes are numbered from 1, write `reduce_zero_label: true`"),
        ([[10, 20]], "if these are the values of the classes, write `classes: {10: back, 20: fore}`"),
        ([[0, 1], [0, 1], [0, 77, 3]], "but 2 classes (0..1) and 255 = ignore; such labels are in 1 of 4 masks"),
    ],
)  # fmt: skip
def test_undeclared_labels_are_counted_and_the_remedy_is_named(tmp_path, refusal, masks, hint):
    opened = dataset(tmp_path, TWO, masks, masks[:1])
    assert refusal(lambda: opened.digest).endswith(hint)


@pytest.mark.parametrize("stated", ["classes: [a, b, c]\npalette: {colours}\n", "classes: {{0: a, 1: b, 2: c}}\n"])
def test_palettes_that_disagree_are_refused_unless_colours_or_values_are_stated(tmp_path, refusal, stated):
    dataset(tmp_path, "classes: [a, b, c]\n", [[0, 1, 2], [0, 1, 2]], [[0, 1, 2]])
    colours = np.array([[10, 0, 0], [0, 10, 0], [0, 0, 10]], np.uint8)
    for number, order in enumerate(([0, 1, 2], [1, 0, 2])):
        mask = Image.fromarray(np.tile(np.arange(3, dtype=np.uint8), (4, 1)))
        mask.putpalette(colours[order].ravel().tolist())
        mask.save(tmp_path / f"masks/train/{number}.png")
    line = refusal(lambda: FolderDataset(tmp_path / "dataset.yaml", tmp_path / "cache").digest)
    assert "masks/train/1.png: the colour [0, 10, 0] is index 0 in its palette and 1 in that of train/0, so a" in line
    assert "state the colours of the classes to read by colour, or their values" in line
    description = (tmp_path / "dataset.yaml").read_text()
    description = description.replace("classes: [a, b, c]\n", stated.format(colours=colours.tolist()))
    (tmp_path / "dataset.yaml").write_text(description)
    assert warned(FolderDataset(tmp_path / "dataset.yaml", tmp_path / "cache")) == []
