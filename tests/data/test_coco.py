"""COCO annotations as masks: categories, what is unlabelled, overlaps, and files that are wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.data.base import IGNORE_INDEX
from harness.data.folder import FolderDataset
from tests.support.tiny_files import picture, save

Refusal = Callable[[Callable[[], object]], str]
TEXT = "image: '{split}/{stem}'\nmask: '{split}.json'\n"
SQUARE = [[0, 0, 6, 0, 6, 6, 0, 6]]  # columns and rows 0..5
INSIDE = [[2, 2, 4, 2, 4, 4, 2, 4]]  # 2..3


def annotation(category: int, segmentation: Any, image: int = 0) -> dict[str, Any]:
    return {"id": 70 + category, "image_id": image, "category_id": category, "segmentation": segmentation}


def write(root: Path, *annotations: dict[str, Any], **changes: Any) -> None:
    """Two splits of one image of 10 rows and 8 columns, with the same objects."""
    for number, split in enumerate(("train", "test")):
        save(root / split / "a.jpg", picture(number, 10, 8))
        content = {
            "images": [{"id": 0, "file_name": "a.jpg", "height": 10, "width": 8}],
            "categories": [{"id": 3, "name": "car"}, {"id": 9, "name": "road"}],
            "annotations": list(annotations),
        }
        (root / f"{split}.json").write_text(json.dumps(content | changes))


def opened(root: Path, text: str = "classes: [road, back, car]\nunlabelled: back\n") -> FolderDataset:
    (root / "dataset.yaml").write_text(TEXT + text)
    return FolderDataset(root / "dataset.yaml", root / "cache")


def mask(dataset: FolderDataset) -> np.ndarray:
    pytest.importorskip("pycocotools")
    assert dataset.digest
    return dataset.load(dataset.samples("train")[0]).mask


def test_categories_are_classes_by_name_and_the_rest_is_the_unlabelled_class(tmp_path: Path) -> None:
    write(tmp_path, annotation(9, SQUARE))
    expected = np.full((10, 8), 1)
    expected[:6, :6] = 0
    np.testing.assert_array_equal(mask(opened(tmp_path)), expected)


def test_categories_are_classes_by_number_and_the_rest_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, annotation(9, SQUARE), annotation(3, [[6, 6, 8, 6, 8, 8, 6, 8]]))
    expected = np.full((10, 8), IGNORE_INDEX)
    expected[:6, :6] = 1
    expected[6:8, 6:8] = 0
    found = mask(opened(tmp_path, "classes: {3: vehicle, 9: street}\nunlabelled: ignore\n"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("order", [1, -1])
def test_smaller_object_is_on_top(tmp_path: Path, order: int) -> None:
    write(tmp_path, *[annotation(9, SQUARE), annotation(3, INSIDE)][::order])
    found = mask(opened(tmp_path))
    assert (found[2, 2], found[1, 1], found[9, 7]) == (2, 0, 1)


def test_later_one_of_equal_objects_is_on_top(tmp_path: Path) -> None:
    write(tmp_path, annotation(9, SQUARE), annotation(3, SQUARE), annotation(9, [[6, 6, 8, 6, 8, 8, 6, 8]]))
    assert mask(opened(tmp_path))[0, 0] == 2


def test_run_lengths_are_read_compressed_or_not(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    region = np.zeros((10, 8), np.uint8)
    region[3:7, 1:5] = 1
    packed = coco.encode(np.asfortranarray(region))
    counts = [13, 4, 6, 4, 6, 4, 6, 4, 33]
    for segmentation in (
        {"size": [10, 8], "counts": packed["counts"].decode()},
        {"size": [10, 8], "counts": counts},
    ):
        write(tmp_path, annotation(3, segmentation))
        np.testing.assert_array_equal(mask(opened(tmp_path)) == 2, region)


def test_object_of_several_polygons_is_their_union(tmp_path: Path) -> None:
    write(tmp_path, annotation(3, [*INSIDE, [6, 6, 8, 6, 8, 8, 6, 8]]))
    found = mask(opened(tmp_path))
    assert (found[2, 2], found[7, 7], found[5, 5]) == (2, 2, 1)


def test_unlabelled_pixels_are_not_taken_for_a_class_of_255(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    write(tmp_path, annotation(9, SQUARE), annotation(3, INSIDE))
    content = json.loads((tmp_path / "test.json").read_text())
    (tmp_path / "test.json").write_text(json.dumps(content | {"annotations": [annotation(9, SQUARE)]}))
    dataset = opened(tmp_path, "classes: [road, car]\nunlabelled: ignore\n")
    assert dataset.oddities == [
        "class car never occurs in test: not scored",
        "55 % of the pixels of train are ignored",
        "55 % of the pixels of test are ignored",
    ]


def test_ignored_category_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, annotation(9, SQUARE), annotation(3, INSIDE))
    found = mask(opened(tmp_path, "classes: [road, back]\nunlabelled: back\nignore: [3]\n"))
    assert (found[2, 2], found[1, 1]) == (IGNORE_INDEX, 0)


def test_digest_follows_the_objects_and_what_is_unlabelled(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    write(tmp_path, annotation(9, SQUARE), annotation(3, INSIDE))
    before = opened(tmp_path).digest
    assert opened(tmp_path, "classes: [road, back, car]\nunlabelled: ignore\n").digest != before
    write(tmp_path, annotation(9, SQUARE), annotation(3, [[2, 2, 5, 2, 5, 5, 2, 5]]))
    assert opened(tmp_path).digest != before


def test_one_file_with_a_fraction_and_file_names_of_other_folders(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    for number in range(5):
        save(tmp_path / f"pictures/{number}.jpg", picture(number, 10, 8))
    write(
        tmp_path,
        *(annotation(9, SQUARE, number) for number in range(5)),
        images=[
            {"id": number, "file_name": f"C:\\upload\\{number}.jpg", "height": 10, "width": 8} for number in range(5)
        ],
    )
    (tmp_path / "dataset.yaml").write_text(
        "image: pictures/{stem}\nmask: train.json\nclasses: [road, back]\nunlabelled: back\nsplits: {test: 0.4}\n"
    )
    dataset = FolderDataset(tmp_path / "dataset.yaml", tmp_path / "cache")
    assert dataset.digest
    assert [len(dataset.samples(split)) for split in ("train", "test")] == [3, 2]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("classes: [road, car]\n", "unlabelled: which class are pixels outside of all objects? Expected one of"),
        ("classes: [road, car]\nunlabelled: sky\n", "unlabelled: sky: which class are pixels outside"),
        ("classes: [road, sky]\nunlabelled: sky\n", "category 'car' (id 3) is not a class; add it to `classes`, or"),
        ("classes: {9: road, 4: car}\nunlabelled: ignore\n", "category 'car' (id 3) is not a class"),
        (
            "classes: [road, car]\nunlabelled: road\nreduce_zero_label: true\n",
            "reduce_zero_label: is only for masks, not",
        ),
    ],
)
def test_description_must_say_what_everything_is(tmp_path: Path, refusal: Refusal, text: str, complaint: str) -> None:
    write(tmp_path, annotation(3, SQUARE))
    assert complaint in refusal(lambda: opened(tmp_path, text).digest)


def test_unlabelled_is_for_annotations_alone(folder: Path, refusal: Refusal) -> None:
    (folder / "dataset.yaml").write_text("classes: [sky, road, tree]\nunlabelled: sky\n")
    message = refusal(lambda: FolderDataset(folder / "dataset.yaml", folder / "cache"))
    assert message.endswith("unlabelled: sky: is only for COCO annotations; masks label every pixel")


@pytest.mark.parametrize(
    ("segmentation", "complaint"),
    [
        ([], "annotation 73 has no segmentation (a box is not enough); remove it"),
        ([[0, 0, 5, 5]], "annotation 73 has a polygon of fewer than three points"),
        ([[0, 0, 1e9, 0, 5, 5]], "annotation 73 has a polygon far outside its image"),
        ({"size": [8, 10], "counts": "abc"}, "annotation 73 has run lengths for [8, 10], but its image is [10, 8]"),
        ({"size": [10, 8], "counts": [3, 2]}, "annotation 73 has run lengths that do not fill its image"),
        ({"size": [10, 8], "counts": "32"}, "annotation 73 has run lengths that do not fill its image"),
    ],
)
def test_segmentation_that_would_be_misread_is_refused(
    tmp_path: Path, refusal: Refusal, segmentation: Any, complaint: str
) -> None:
    pytest.importorskip("pycocotools")
    write(tmp_path, annotation(3, segmentation))
    assert f"{tmp_path}/train.json: {complaint}" in refusal(lambda: opened(tmp_path).digest)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": [{"id": 0, "file_name": "b.jpg", "height": 10, "width": 8}]}, "train.json: no image b.jpg below"),
        ({"images": 2 * [{"id": 0, "file_name": "a.jpg"}]}, "two images have one id or one file_name"),
        ({"images": [{"id": 0, "file_name": "a.jpg"}, {"id": 1, "file_name": "./a.jpg"}]}, "train/a.jpg twice"),
        ({"images": []}, "a.jpg: is not among the images of"),
        ({"images": [{"id": 0, "file_name": "a.jpg", "height": 8, "width": 10}]}, "train.json: 10x8 pixels, but"),
        ({"images": [{"id": 0, "file_name": "a.jpg"}]}, "height None and width None of an image; expected whole"),
        ({"annotations": [annotation(5, SQUARE)]}, "annotation 75 is of a category that is not in `categories`"),
        ({"annotations": [{"id": 1}]}, "not a file of COCO annotations: 'image_id' is missing"),
        ({"categories": 3}, "not a file of COCO annotations: 'int' object is not iterable"),
    ],
)
def test_annotations_that_are_wrong_are_named(
    tmp_path: Path, refusal: Refusal, changes: dict[str, Any], complaint: str
) -> None:
    pytest.importorskip("pycocotools")
    write(tmp_path, **changes)
    assert complaint in refusal(lambda: opened(tmp_path).digest)


def test_missing_library_is_named_with_its_extra(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, annotation(9, SQUARE))
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert "COCO annotations need pycocotools: pip install pycocotools (the extra `coco`)" in refusal(
        lambda: opened(tmp_path).digest
    )
