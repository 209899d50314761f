"""`dataset.yaml` guessed from the files of a folder: each layout is found, and its description opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.data.folder import FolderDataset
from harness.data.guess import guess
from harness.util.files import read_yaml
from tests.support.tiny_files import labels, picture, save, tiff

Refusal = Callable[[Callable[[], object]], str]
COLOURS = np.array([[0, 0, 0], [128, 64, 128], [70, 130, 180]], np.uint8)


def write(
    root: Path,
    image: str,
    *masks: str,
    splits: Sequence[str] = ("train", "val", "test"),
    each: int = 3,
    classes: int = 3,
) -> None:
    """Images of noise, and masks of few values at every mask pattern."""
    for number, split in enumerate(splits):
        for index in range(each):
            seed = 10 * number + index
            for pattern, pixels in [(image, picture(seed)), *((mask, labels(seed, classes)) for mask in masks)]:
                save(root / pattern.format(split=split, stem=f"{split[:2]}{index}", n=index % 2, i=seed), pixels)


def fields(root: Path) -> dict:
    return read_yaml(guess(root, ".").text)


def opened(root: Path) -> FolderDataset:
    (root / "dataset.yaml").write_text(guess(root, ".").text, encoding="utf-8")
    dataset = FolderDataset(root / "dataset.yaml", root / "cache")
    assert dataset.digest
    return dataset


def counts(dataset: FolderDataset) -> list[int]:
    return [len(dataset.samples(split)) for split in ("train", "dev", "test")]


THREE = {"train": "train", "dev": "val", "test": "test"}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{split}/{stem}.png", "masks/{split}/{stem}.png"),
        ("images/{split}/{stem}.png", "masks/{split}/{stem}_mask.png"),
        ("img_dir/{split}/{stem}.png", "ann_dir/{split}/{stem}.png"),
        ("{split}/images/{stem}.png", "{split}/masks/{stem}.png"),
        ("{split}/{stem}.png", "{split}/{stem}_L.png"),
        ("{split}/{stem}.png", "{split}annot/{stem}.png"),
        ("{split}/{stem}.png", "{split}/mask_{stem}.png"),
        ("{split}_images/{stem}.bmp", "{split}_masks/{stem}.png"),
        ("{split}/{stem}/image.png", "{split}/{stem}/mask.png"),
    ],
)
def test_patterns_and_splits_are_found(tmp_path: Path, image: str, mask: str) -> None:
    write(tmp_path, image, mask)
    found = fields(tmp_path)
    assert (found["image"], found["mask"], found["splits"]) == (image, mask, THREE)
    assert counts(opened(tmp_path)) == [3, 3, 3]


def test_masks_of_cityscapes_are_found_beside_its_other_pictures(tmp_path: Path) -> None:
    stem = "{split}/c{n}/c{n}_{stem}_"
    write(tmp_path, f"leftImg8bit/{stem}leftImg8bit.png", f"gtFine/{stem}gtFine_labelIds.png")
    for path in tmp_path.glob("gtFine/*/*/*_labelIds.png"):
        values = np.asarray(Image.open(path))
        save(path.with_name(path.name.replace("labelIds", "color")), COLOURS[values])
        save(
            path.with_name(path.name.replace("labelIds", "instanceIds")), np.arange(192, dtype=np.uint8).reshape(12, 16)
        )
    found = fields(tmp_path)
    assert found["image"] == "leftImg8bit/{split}/{stem}_leftImg8bit.png"
    assert found["mask"] == "gtFine/{split}/{stem}_gtFine_labelIds.png"
    assert "also: gtFine/{split}/{stem}_gtFine_color.png" in guess(tmp_path, ".").text
    assert "18 pictures in no pair: gtFine/test/c0/" in guess(tmp_path, ".").summary[3]
    assert counts(opened(tmp_path)) == [3, 3, 3]


def test_names_of_splits_are_recognised_and_validation_is_test_without_one(tmp_path: Path) -> None:
    write(tmp_path, "images/{split}/{stem}.png", "labels/{split}/{stem}.png", splits=("training", "validation"))
    assert fields(tmp_path)["splits"] == {"train": "training", "test": "validation"}
    assert counts(opened(tmp_path)) == [3, 0, 3]


@pytest.mark.parametrize("names", ["tr{0}", "tr{0}.png", "photos/tr{0}.png labels/tr{0}.png"])
def test_lists_of_splits_are_found(tmp_path: Path, names: str) -> None:
    write(tmp_path, "photos/{stem}.png", "labels/{stem}.png", splits=("train",), each=6)
    (tmp_path / "Sets").mkdir()
    for split, numbers in (("train", (0, 1, 2)), ("val", (3, 4)), ("test", (5,))):
        (tmp_path / f"Sets/{split}.txt").write_text("".join(f"{names.format(number)}\n" for number in numbers))
    (tmp_path / "Sets/trainval.txt").write_text("tr0\n")
    (tmp_path / "notes.txt").write_text("nothing of interest\n")
    assert counts(opened(tmp_path)) == [3, 2, 1]


def test_one_folder_gets_a_fraction_and_groups(tmp_path: Path) -> None:
    for patient in range(6):
        for eye in "LR":
            save(tmp_path / f"photos/p{patient:02d}{eye}.png", picture(patient))
            save(tmp_path / f"truth/p{patient:02d}{eye}.png", labels(patient))
    dataset = opened(tmp_path)
    assert counts(dataset) == [8, 0, 4]
    assert {sample.group for sample in dataset.samples("test")} < {f"p{patient:02d}" for patient in range(6)}


@pytest.mark.parametrize(
    ("stems", "pattern"),
    [
        (
            [f"clip{c}_{f:04d}" for c in range(5) for f in range(2)],
            "frames of one clip? 5 groups, such as clip0; remove",
        ),
        ([f"s{c}_r{f}_c0" for c in range(5) for f in range(2)], "tiles of one image? 5 groups, such as s0; remove it"),
        ([f"s{c}/{f}" for c in range(2) for f in range(2)], "a folder each? 2 groups, such as s0; use it if"),
        ([f"{f:04d}" for f in range(4)], "if images resemble each other"),
    ],
)
def test_groups_are_guessed_from_names(tmp_path: Path, stems: list[str], pattern: str) -> None:
    for stem in stems:
        save(tmp_path / f"a/{stem}.png", picture())
        save(tmp_path / f"b/{stem}.png", labels())
    text = guess(tmp_path, ".").text
    assert pattern in text
    assert ("\ngroup: " in text) == (len(stems) == 10)


def masks(root: Path, *pixels: np.ndarray, palette: Sequence[np.ndarray] = ()) -> None:
    for number, values in enumerate(pixels):
        save(root / f"images/{number}.png", picture(number))
        mask = Image.fromarray(values)
        if palette:
            mask = Image.fromarray(values, mode="P")
            mask.putpalette(palette[number].reshape(-1).tolist())
        (root / "masks").mkdir(exist_ok=True)
        mask.save(root / f"masks/{number}.png")


BACK = labels() * 0
BACK[0, :5] = 1


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (BACK, {0: "background", 1: "foreground"}),
        (BACK * 255, {0: "background", 255: "foreground"}),
        (labels() + 1, {1: "class_0", 2: "class_1", 3: "class_2"}),
        (labels() * 10, {0: "class_0", 10: "class_1", 20: "class_2"}),
        (np.where(BACK == 1, labels(1), 0).astype(np.uint8), {0: "background", 1: "class_1", 2: "class_2"}),
        (COLOURS[BACK], {"background": [0, 0, 0], "foreground": [128, 64, 128]}),
        (COLOURS[1 + BACK], {"class_0": [128, 64, 128], "class_1": [70, 130, 180]}),
    ],
    ids=["0 1", "0 255", "from one", "codes", "background", "colours", "colours without black"],
)
def test_classes_are_what_masks_hold(tmp_path: Path, values: np.ndarray, classes: dict) -> None:
    masks(tmp_path, values, values)
    assert fields(tmp_path)["classes"] == classes


def soft(number: int) -> np.ndarray:
    """A disc of 255 whose edge is blurred, as drawing programs and JPEG leave it."""
    rows, columns = np.mgrid[:48, :64]
    return np.clip(128 + 40 * (15 + number - np.hypot(rows - 24, columns - 32)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sharp", [0, 40], ids=["all", "few"])
def test_binary_masks_with_soft_edges_are_refused(tmp_path: Path, refusal: Refusal, sharp: int) -> None:
    edges = [soft(number % 4) for number in range(6)]
    masks(tmp_path, *[np.where(edges[0] > 127, 255, 0).astype(np.uint8)] * sharp, *edges, edges[0] // 255 * 255)
    assert "binary masks with soft edges (anti-aliased, or once JPEG); save them" in refusal(
        lambda: guess(tmp_path, ".")
    )


def test_many_classes_beside_ignored_pixels_have_no_soft_edges(tmp_path: Path) -> None:
    values = np.zeros((48, 64), np.uint8)
    values[:10], values[20] = 255, np.arange(64) % 20
    masks(tmp_path, values, values)
    assert list(fields(tmp_path)["classes"]) == list(range(20))


def test_labels_are_preferred_to_masks_of_the_field_of_view(tmp_path: Path) -> None:
    image, view, manual = "{split}/images/{stem}.png", "{split}/mask/{stem}_mask.png", "{split}/1st_manual/{stem}_m.png"
    write(tmp_path, image, view, manual, splits=("training", "test"), classes=2)
    assert fields(tmp_path)["mask"] == manual
    assert f"also: {view}" in guess(tmp_path, ".").text
    for path in (tmp_path / "test/1st_manual").iterdir():
        path.unlink()
    found = guess(tmp_path, ".")
    doubt = f"is {view} a field of view, and are the labels in training/1st_manual/tr0_m.png and 2 more?"
    assert f"# {doubt}\n" in found.text
    assert doubt in found.summary


def test_folders_that_are_left_out_are_counted(tmp_path: Path) -> None:
    for fold in range(3):
        write(tmp_path, f"fold{fold}/images/{{stem}}.png", f"fold{fold}/masks/{{stem}}.png", splits=(f"x{fold}",))
    expected = "12 pictures left out, in no pair of these patterns (fold1/images: 3, fold1/masks: 3, fold2/images: 3, "
    assert expected in guess(tmp_path, ".").text


def test_ignored_value_is_stated(tmp_path: Path) -> None:
    values = BACK.copy()
    values[1] = 255
    masks(tmp_path, values, BACK)
    assert fields(tmp_path)["classes"] == {0: "background", 1: "foreground"}
    assert "255 is ignored, unless you add `255: name`" in guess(tmp_path, ".").text


def test_palettes_of_one_order_give_colours_and_of_several_orders_too(tmp_path: Path) -> None:
    values = labels()
    masks(tmp_path / "one", values, values, palette=[COLOURS, COLOURS])
    assert list(fields(tmp_path / "one")["classes"].values()) == COLOURS.tolist()
    masks(tmp_path / "two", values, values, palette=[COLOURS, COLOURS[::-1]])
    assert sorted(fields(tmp_path / "two")["classes"].values()) == sorted(COLOURS.tolist())


def test_names_come_from_a_file_of_as_many_lines(tmp_path: Path) -> None:
    masks(tmp_path, BACK, BACK)
    (tmp_path / "classes.txt").write_text("no\nnasse Straße\n")
    assert fields(tmp_path)["classes"] == {0: "no", 1: "nasse Straße"}


def test_range_of_deep_images_is_guessed_and_stated(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / f"images/{number}.png", np.linspace(100, 3000, 192).reshape(12, 16).astype(np.uint16))
        save(tmp_path / f"masks/{number}.png", labels())
    low, high = fields(tmp_path)["range"]
    assert 100 < low < 140
    assert 2960 < high < 3000
    assert "more than 8 bits: 1 % and 99 % of the values of 2 images" in guess(tmp_path, ".").text


def test_images_that_opencv_does_not_read_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        save(tmp_path / f"masks/{number}.png", labels(number))
        path = tmp_path / f"images/{number}.tif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tiff(np.full((12, 16, 5), number, np.uint16)))
    assert "state `bands: [red, green, blue]`" in guess(tmp_path, ".").text
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{split}/{stem}.jpg", "{split}/_annotations.coco.json"),
        ("{split}/{stem}.jpg", "annotations/instances_{split}.json"),
    ],
)
def test_coco_annotations_are_found(tmp_path: Path, image: str, mask: str) -> None:
    pytest.importorskip("pycocotools")
    for number, split in enumerate(("train", "val")):
        save(tmp_path / image.format(split=split, stem="a"), picture(number, 10, 8))
        content = {
            "images": [{"id": 0, "file_name": "a.jpg", "height": 10, "width": 8}],
            "categories": [{"id": 0, "name": "group"}, {"id": 3, "name": "yes"}, {"id": 4, "name": "yes"}],
            "annotations": [{"id": 1, "image_id": 0, "category_id": 3, "segmentation": [[0, 0, 5, 0, 5, 5, 0, 5]]}],
        }
        (tmp_path / mask.format(split=split)).parent.mkdir(exist_ok=True)
        (tmp_path / mask.format(split=split)).write_text(json.dumps(content))
        (tmp_path / f"{split}.json").write_text("[]")
    found = fields(tmp_path)
    assert found["classes"] == ["background", "yes"]
    assert (found["mask"], found["unlabelled"], found["splits"]) == (
        mask,
        "background",
        {"train": "train", "test": "val"},
    )
    assert counts(opened(tmp_path)) == [1, 0, 1]


def coco(path: Path, image: str, category: object = 3) -> None:
    content = {
        "images": [{"id": 0, "file_name": image, "height": 12, "width": 16}],
        "categories": [{"id": 3, "name": "car"}],
        "annotations": [{"id": 1, "image_id": 0, "category_id": category, "segmentation": [[0, 0, 5, 0, 5, 5, 0, 5]]}],
    }
    path.write_text(json.dumps(content))


def test_damaged_annotations_are_named(tmp_path: Path, refusal: Refusal) -> None:
    for split in ("train", "val"):
        save(tmp_path / f"{split}/{split}.png", picture())
        coco(tmp_path / f"{split}.json", f"{split}.png")
    (tmp_path / "val.json").write_text("[1, 2]")
    assert (
        "# left out: val.json: not a file of COCO annotations: expected `images`, `annotations` and"
        in guess(tmp_path, ".").text
    )
    (tmp_path / "train.json").write_text("{}")
    found = refusal(lambda: guess(tmp_path, "."))
    assert "among 2 pictures: train.json: not a file of COCO annotations: 'categories' is missing and 1 more;" in found
    coco(tmp_path / "train.json", "train.png", category="3")
    assert "train.json: no annotation has the `category_id` of one of" in refusal(lambda: guess(tmp_path, "."))


def test_damaged_files_do_not_stop_it(tmp_path: Path) -> None:
    masks(tmp_path, *[BACK] * 5)
    (tmp_path / "images/1.png").write_bytes(b"")
    (tmp_path / "masks/1.png").write_bytes(b"")
    assert fields(tmp_path)["classes"] == {0: "background", 1: "foreground"}


def test_folders_without_pairs_are_an_error(tmp_path: Path, refusal: Refusal) -> None:
    assert f"{tmp_path}: no images with masks among 0 pictures; write" in refusal(lambda: guess(tmp_path, "."))
    for number in range(3):
        save(tmp_path / f"images/{number}.jpg", picture(number))
        save(tmp_path / f"masks/{number}.jpg", labels(number))
    assert "pair, but neither holds labels (JPEG changes labels; save masks as PNG)" in refusal(
        lambda: guess(tmp_path, ".")
    )
    for path in (tmp_path / "masks").iterdir():
        path.unlink()
    assert "no images with masks among 3 pictures; write" in refusal(lambda: guess(tmp_path, "."))
    assert "nowhere: no such folder" in refusal(lambda: guess(tmp_path / "nowhere", "."))


def test_name_with_a_line_break_stays_in_its_comment(tmp_path: Path) -> None:
    for patient in range(2):
        for frame in range(2):
            save(tmp_path / f"a/p{patient}\nignore: [1] #_{frame}.png", picture())
            save(tmp_path / f"b/p{patient}\nignore: [1] #_{frame}.png", BACK)
    save(tmp_path / "c\nignore: [1] #/gt.png", BACK)
    assert "ignore" not in fields(tmp_path)


def test_masks_of_one_value_are_described(tmp_path: Path) -> None:
    masks(tmp_path, BACK * 0 + 255, BACK * 0 + 255)
    assert fields(tmp_path)["classes"] == {255: "class_0"}
