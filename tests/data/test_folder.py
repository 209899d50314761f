"""Own datasets: what a description may say, what the check finds, and when it is repeated."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.data import folder as folder_module
from harness.data.base import IGNORE_INDEX
from harness.data.folder import FolderDataset, distinct_colours
from harness.data.splits import split_samples
from tests.support.tiny_files import labels, picture, save


def opened(folder: Path) -> FolderDataset:
    return FolderDataset(folder / "dataset.yaml", folder / "cache")


def describe(folder: Path, text: str) -> None:
    (folder / "dataset.yaml").write_text(text)


def test_pairs_are_read_as_rgb_and_labels_in_order_of_names(folder):
    dataset = opened(folder)
    samples = dataset.samples("train")
    assert [sample.name for sample in samples] == [f"train/scene{n}" for n in ("0/0", "0/2", "1/1", "1/3")]
    image, mask = dataset.load(samples[1])
    np.testing.assert_array_equal(image, picture(2))
    np.testing.assert_array_equal(mask, labels(2))


def test_palette_masks_are_indices_and_ignored_labels_become_255(folder):
    describe(folder, "classes: [sky, road, tree]\nignore: [9]\n")
    values = labels(0)
    values[0, :3] = (9, 255, 1)
    mask = Image.fromarray(values, mode="P")
    mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    mask.save(folder / "masks/train/scene0/0.png")
    dataset = opened(folder)
    assert dataset.digest
    assert dataset.load(dataset.samples("train")[0]).mask[0, :3].tolist() == [IGNORE_INDEX, IGNORE_INDEX, 1]


def test_group_is_the_capture_group_or_the_sample_itself(folder):
    assert len({sample.group for sample in opened(folder).samples("train")}) == 4
    describe(folder, "classes: [sky, road, tree]\ngroup: (scene.)/\n")
    assert {sample.group for sample in opened(folder).samples("train")} == {"scene0", "scene1"}


def test_test_split_defaults_to_val_without_a_test_folder(folder):
    for kind in ("images", "masks"):
        (folder / kind / "test").rename(folder / kind / "val")
    assert len(opened(folder).samples("test")) == 2
    assert opened(folder).samples("dev") == []


CLASSES = "classes: [sky, road, tree]\n"


def add_dev(folder: Path, name: str) -> None:
    for number in range(3):
        save(folder / "images" / name / f"dev{number}.png", picture(number + 10))
        save(folder / "masks" / name / f"dev{number}.png", labels(number + 10))


@pytest.mark.parametrize(
    ("name", "splits", "sizes"),
    [
        ("val", "", [4, 3, 2]),
        ("val", "splits: {train: train, dev: val, test: test}", [4, 3, 2]),
        ("dev", "splits: {dev: dev}", [4, 3, 2]),
        ("val", "splits: {train: train, test: test}", [4, 0, 2]),  # as the file says: dev is held out
        ("val", "splits: {train: train, test: val}", [4, 0, 3]),
        ("other", "", [4, 0, 2]),
    ],
)
def test_dev_split_is_the_named_one_or_val_if_there_is_a_test_split(folder, name, splits, sizes):
    add_dev(folder, name)
    describe(folder, CLASSES + splits)
    dataset = opened(folder)
    assert [len(dataset.samples(split)) for split in ("train", "dev", "test")] == sizes
    assert dataset.digest
    fitted, held = split_samples(dataset, "dev", 0.2)
    assert (len(fitted), len(held)) == ((4, 3) if sizes[1] else (3, 1))


def test_digest_covers_the_dev_split(folder):
    without = opened(folder).digest
    add_dev(folder, "val")
    before = opened(folder).digest
    assert before != without
    save(folder / "masks/val/dev0.png", labels(7))
    assert opened(folder).digest != before


def test_damaged_file_of_the_dev_split_is_named(folder, refusal):
    add_dev(folder, "val")
    truncate(folder / "images/val/dev1.png")
    assert re.search(r"images/val/dev1.png: .*(truncated|broken)", refusal(lambda: opened(folder).digest))


@pytest.mark.parametrize(
    ("splits", "complaint"),
    [
        ("{test: train}", "splits.test: train: is the folder of the train split too; splits must not overlap"),
        ("{dev: ./train/}", "splits.dev: ./train/: is the folder of the train split too"),
        ("{dev: test}", "splits.test: test: is the folder of the dev split too"),
        (
            "{test: /data/test}",
            "splits.test: /data/test: use the name of a folder, or of a list of names, below `root`",
        ),
        ("{val: val}", "splits.val: no such field; known: dev, test, train"),
    ],
)
def test_splits_that_cannot_be_used_are_an_error(folder, refusal, splits, complaint):
    describe(folder, f"{CLASSES}splits: {splits}\n")
    assert refusal(lambda: opened(folder)).startswith(f"{folder / 'dataset.yaml'}: {complaint}")


def test_split_folder_inside_another_overlaps(folder, refusal):
    describe(folder, f"{CLASSES}splits: {{train: ., test: test}}\n")
    message = refusal(lambda: opened(folder).digest)
    assert "images/test/scene0/0.png: is in the test split and in the train split (and 1 more such problems)" in message


def test_val_as_dev_without_a_test_folder_asks_for_one(folder, refusal):
    add_dev(folder, "val")
    for kind in ("images", "masks"):
        (folder / kind / "test").rename(folder / kind / "holdout")
    describe(folder, f"{CLASSES}splits: {{dev: val}}\n")
    assert "images/test: no such folder; the test split is not there; `image`, `mask` and `splits` say" in refusal(
        lambda: opened(folder).digest
    )


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("(city.)/", "matches none of the 4 names of the train split, such as 'scene0/0'"),
        ("(scene0)/", "matches only 2 of the 4 names of the train split, and not 'scene1/1'"),
        ("scene(9)?", "matches none of the 4 names of the train split, such as 'scene0/0'"),
    ],
)
def test_group_pattern_that_does_not_match_is_an_error(folder, refusal, pattern, complaint):
    describe(folder, f"{CLASSES}group: {pattern}\n")
    message = refusal(lambda: opened(folder).digest)
    assert message.startswith(
        f"{folder / 'dataset.yaml'}: group: {pattern}: {complaint}; a name is what `{{stem}}` matches"
    )


@pytest.mark.parametrize(
    ("name", "pattern", "group"), re.findall(r"^    (\S+)\.\w+ +'(.+)' +(\w+): ", folder_module.__doc__ or "", re.M)
)
def test_documented_group_patterns_give_the_documented_groups(name, pattern, group):
    found = re.search(pattern, name)
    assert found and found[1] == group


def test_classes_with_colours_give_names_and_palette(folder):
    describe(folder, "classes: {sky: [1, 2, 3], road: [4, 5, 6], tree: [7, 8, 9]}\nscale: [512, 2048]\n")
    dataset = opened(folder)
    assert dataset.classes == ("sky", "road", "tree")
    assert dataset.palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    assert dataset.scale == (2048, 512)


def test_generated_colours_are_all_different():
    assert len(set(distinct_colours(255))) == 255
    assert distinct_colours(3) == distinct_colours(255)[:3]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("classes: [a, b]\nclases: 3", "clases: no such field; did you mean classes?"),
        ("name: x", "classes: is missing"),
        ("classes: {a: 5, b: [1, 2, 3]}", "palette[0]: 5: expected a list"),
        ("classes: [a]", "classes: ['a']: has length 1; expected at least 2"),
        ("classes: {a: [1, 2], b: [1, 2, 3]}", "palette[0]: has length 2; expected more"),
        ("classes: [a, a]", "classes: a: is listed twice"),
        ('classes: [a, "b\\nc"]', r"classes: 'b\nc': expected one line of 1 to 100 characters"),
        ('classes: [a, ""]', "classes: '': expected one line of 1 to 100 characters"),
        ("classes: [no, yes]", "classes[0]: False: YAML reads no, off and false like this; write the name in quotes"),
        ("classes: [a, b]\npalette: [[0, 0, 0]]", "palette: has 1 colours for 2 classes"),
        ("classes: {a: [0, 0, 256], b: [0, 0, 0]}", "palette[0][2]: 256"),
        ("classes: [a, b]\nignore: [1]", "ignore: 1: is the label of class 'b'"),
        ("classes: [a, b]\ngroup: scene", "group: scene: has 0 capture groups, not one"),
        ("classes: [a, b]\ngroup: '('", "group: (: "),
        ("classes: [a, b", "not YAML"),
        ("- a", "expected the fields of a dataset"),
    ],
)
def test_invalid_description_is_a_one_line_error_with_the_field(folder, refusal, text, complaint):
    describe(folder, text)
    message = refusal(lambda: opened(folder))
    assert message.startswith(f"{folder / 'dataset.yaml'}: ")
    assert complaint in message


def empty_the_train_split(folder: Path) -> None:
    for path in folder.glob("*/train/*/*"):
        path.unlink()


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


SCENE = Path("train/scene0")
BROKEN = {
    "a label out of range": (
        lambda f: save(f / "masks" / SCENE / "0.png", np.pad(labels(0)[1:, 1:], ((1, 0), (1, 0))) // 3 + 23),
        r"masks/train/scene0/0.png: label 23 at \(0, 0\) but 3 classes \(0..2\) and 255 = ignore; .* in 1 of 6 masks$",
    ),
    "a mask of another size": (
        lambda f: save(f / "masks" / SCENE / "0.png", labels(0, height=9)),
        r"masks/train/scene0/0.png: 16x9 pixels, but .*images/train/scene0/0.png has 16x12$",
    ),
    "an image without a mask": (
        lambda f: (f / "masks" / SCENE / "0.png").unlink(),
        r"images/train/scene0/0.png: no mask .*masks/train/scene0/0.png",
    ),
    "a mask without an image": (
        lambda f: (f / "images" / SCENE / "0.png").unlink(),
        r"masks/train/scene0/0.png: no image .*images/train/scene0/0.\*$",
    ),
    "a stem twice": (
        lambda f: save(f / "images" / SCENE / "0.jpg", picture()),
        r"images/train/scene0/0.png: 0.jpg has the same name; remove one$",
    ),
    "an empty split": (empty_the_train_split, r"images/train: no images .*the train split is empty$"),
    "no folder for a split": (
        lambda f: (f / "masks/train").rename(f / "masks/other"),
        r"masks/train: no such folder; the train split is not there",
    ),
    "a truncated image": (
        lambda f: truncate(f / "images" / SCENE / "0.png"),
        r"images/train/scene0/0.png: .*(truncated|broken)",
    ),
    "something that is not an image": (
        lambda f: (f / "images" / SCENE / "0.png").write_text("hello"),
        r"images/train/scene0/0.png: not an image file$",
    ),
    "a mask of colours": (
        lambda f: save(f / "masks" / SCENE / "0.png", picture()),
        r"masks/train/scene0/0.png: a colour mask; .*, or state a different colour for each class: classes: {",
    ),
    "an image of 16 bits": (
        lambda f: save(f / "images" / SCENE / "0.png", picture()[..., 0].astype(np.uint16) * 200),
        r"images/train/scene0/0.png: mode I;16: more than 8 bits a channel",
    ),
    "masks of one class": (
        lambda f: [save(path, labels(0, classes=2) * 255) for path in f.glob("masks/train/*/*")],
        r"the masks of train hold only class 0; .* if 255 is a class, write `classes: {0: sky, 1: road, 255: tree}`$",
    ),
    "a file of train that test links to": (
        lambda f: link(f / "images/test/scene0/0.png", f / "images/train/scene1/1.png"),
        r"images/test/scene0/0.png: is in the test split and in the train split$",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_check_names_the_file_and_the_problem(folder, refusal, kind):
    damage, complaint = BROKEN[kind]
    damage(folder)
    message = refusal(lambda: opened(folder).digest)
    assert message.startswith("dataset shapes: ")
    assert re.search(complaint, message), message


def test_check_counts_further_problems(folder, refusal):
    for path in folder.glob("images/train/*/*"):
        truncate(path)
    assert refusal(lambda: opened(folder).digest).endswith("(and 3 more such problems)")


def test_digest_depends_on_contents_not_paths_or_times(folder, tmp_path):
    before = opened(folder).digest
    os.utime(folder / "masks/train/scene0/0.png", ns=(0, 0))
    moved = folder.rename(tmp_path / "elsewhere")
    assert opened(moved).digest == before


@pytest.mark.parametrize(
    "change",
    [
        lambda f: save(f / "masks/test/scene0/0.png", labels(7)),
        lambda f: save(f / "images/train/scene0/0.png", picture(7)),
        lambda f: describe(f, "classes: [sky, road, bush]"),
        lambda f: describe(f, "classes: [sky, road, tree]\nignore: [7]"),
        lambda f: describe(f, "classes: [sky, road, tree]\nscale: [32, 32]"),
        lambda f: describe(f, "classes: [sky, road, tree]\ngroup: (scene.)/"),
        lambda f: [(f / kind / "train/scene0/0.png").rename(f / kind / "test/0.png") for kind in ("images", "masks")],
    ],
    ids=["mask", "image", "class name", "ignore", "scale", "group", "split"],
)
def test_digest_changes_with_everything_that_can_change_a_result(folder, change):
    before = opened(folder).digest
    change(folder)
    assert opened(folder).digest != before


def test_files_are_decoded_once_and_again_only_when_they_change(folder, monkeypatch):
    before = opened(folder).digest
    mask = folder / "masks/train/scene0/0.png"
    with monkeypatch.context() as patched:
        patched.setattr(FolderDataset, "_check", lambda *_: pytest.fail("decoded again"))
        assert opened(folder).digest == before
    save(mask, labels(7))
    os.utime(mask, ns=(1, 1))
    assert opened(folder).digest != before


def test_failed_check_is_not_cached(folder, refusal):
    image = folder / "images/train/scene0/0.png"
    whole = image.read_bytes()
    truncate(image)
    for _ in range(2):
        assert str(image) in refusal(lambda: opened(folder).digest)
    image.write_bytes(whole)
    assert opened(folder).digest


def test_links_to_folders_are_followed_and_hidden_files_are_not_images(folder, tmp_path):
    for kind in ("images", "masks"):
        (folder / kind / "train/scene0").rename(tmp_path / kind)
        (folder / kind / "train/scene0").symlink_to(tmp_path / kind)
        (folder / kind / "train/._0.png").write_text("left by a file manager")
    assert len(opened(folder).samples("train")) == 4
