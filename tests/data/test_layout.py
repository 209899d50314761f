"""Own datasets: where images and masks lie, by patterns, lists and fractions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from harness.data.file_pairs import files_below
from harness.data.fit import describe_parts, file_warnings
from harness.data.folder import FolderDataset
from harness.data.splits import held_out_groups, split_samples
from tests.support.tiny_files import labels, picture, save

Refusal = Callable[[Callable[[], object]], str]
CLASSES = "classes: [sky, road, tree]\n"


def dataset(root: Path, text: str = "") -> FolderDataset:
    root.mkdir(exist_ok=True)
    (root / "dataset.yaml").write_text(CLASSES + text, encoding="utf-8")
    return FolderDataset(root / "dataset.yaml", root / "cache")


def write(root: Path, image: str, mask: str, splits: Iterable[tuple[str, int]] = (("train", 3), ("test", 2))) -> None:
    """Pairs at the paths that two patterns give; the picture and the labels of a pair have one seed."""
    seed = 0
    for split, count in splits:
        for number in range(count):
            seed += 1
            for pattern, pixels in ((image, picture(seed)), (mask, labels(seed))):
                save(root / pattern.format(split=split, stem=f"{split[:2]}{number}", n=number % 2), pixels)


def check(opened: FolderDataset, train: int = 3, test: int = 2) -> None:
    """Every image has its own mask, which has the same seed."""
    assert opened.digest
    assert [len(opened.samples(split)) for split in ("train", "test")] == [train, test]
    seeds = {picture(seed).tobytes(): seed for seed in range(10)}
    for split in ("train", "test"):
        for sample in opened.samples(split):
            image, mask = opened.load(sample)
            np.testing.assert_array_equal(mask, labels(seeds[image.tobytes()]))


LAYOUTS = {
    "suffix of masks": ("images/{split}/{stem}.png", "masks/{split}/{stem}_mask.png", ""),
    "Cityscapes": ("leftImg8bit/{split}/c{n}/{stem}_leftImg8bit.png", "gtFine/{split}/c{n}/{stem}_gtFine.png", ""),
    "mmsegmentation": ("img_dir/{split}/{stem}.png", "ann_dir/{split}/{stem}.png", ""),
    "split first": ("{split}/images/{stem}.png", "{split}/masks/{stem}.png", ""),
    "split in names (DRIVE)": ("{split}/images/{stem}_{split}.tif", "{split}/manual/{stem}_manual1.gif", ""),
    "one folder a split": ("{split}/{stem}.png", "{split}/{stem}_L.png", ""),
    "one folder": ("{stem}.png", "{stem}_mask.png", "splits: {train: train.txt, test: test.txt}\n"),
    "prefix of masks": ("{split}/{stem}.png", "{split}/mask_{stem}.png", ""),
    "one folder of two formats": ("{split}/{stem}.bmp", "{split}/{stem}.png", ""),
    "a folder for each image": ("{split}/{stem}/image.png", "{split}/{stem}/mask.png", ""),
    "stem twice": ("{split}/{stem}/{stem}_image.png", "{split}/{stem}/{stem}_label.png", ""),
    "masks alone have splits": ("photos/{stem}.png", "{split}/{stem}.png", ""),
    "a format that is not read by default": ("{split}/{stem}.ppm", "{split}/{stem}.ah.ppm", ""),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_patterns_pair_images_and_masks(tmp_path: Path, kind: str) -> None:
    image, mask, more = LAYOUTS[kind]
    write(tmp_path, image, mask)
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / f"{split}.txt").write_text("".join(f"{split[:2]}{number}\n" for number in range(count)))
    nested = (pattern.replace("c{n}/", "") for pattern in (image, mask))
    image, mask = nested
    check(dataset(tmp_path, f"image: '{image}'\nmask: '{mask}'\n{more}"))


def test_pattern_without_suffix_means_all_formats_and_a_suffix_any_case(tmp_path: Path) -> None:
    write(tmp_path, "a/{split}/{stem}.JPG", "b/{split}/{stem}_m.PNG", [("train", 2), ("test", 1)])
    write(tmp_path, "a/{split}/{stem}9.webp", "b/{split}/{stem}9_m.tif", [("test", 2)])
    any_format = dataset(tmp_path, "image: a/{split}/{stem}\nmask: b/{split}/{stem}_m\n")
    assert [len(any_format.samples(split)) for split in ("train", "test")] == [2, 3]
    one_format = dataset(tmp_path, "image: a/{split}/{stem}.jpg\nmask: b/{split}/{stem}_m.png\n")
    assert [len(one_format.samples(split)) for split in ("train", "test")] == [2, 1]


def test_stems_have_folders_and_groups_are_searched_in_them(tmp_path: Path) -> None:
    write(tmp_path, "{split}/im/c{n}/{stem}.png", "{split}/an/c{n}/{stem}_m.png")
    opened = dataset(tmp_path, "image: '{split}/im/{stem}.png'\nmask: '{split}/an/{stem}_m.png'\ngroup: '(.+)/'\n")
    assert [(one.name, one.group) for one in opened.samples("train")] == [
        ("train/c0/tr0", "c0"),
        ("train/c0/tr2", "c0"),
        ("train/c1/tr1", "c1"),
    ]


def test_description_of_the_default_patterns_has_the_digest_of_none(folder: Path) -> None:
    before = FolderDataset(folder / "dataset.yaml", folder / "cache").digest
    assert dataset(folder, "image: images/{split}/{stem}\nmask: masks/{split}/{stem}\n").digest == before
    assert dataset(folder, "image: images/{split}/{stem}.png\nmask: masks/{split}/{stem}.png\n").digest == before


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("image: '{split}/{name}.jpg'", "image: {split}/{name}.jpg: {name} is not known; use {stem} and {split}"),
        ("mask: masks/{split}/*.png", "mask: masks/{split}/*.png: has no {stem}, the part of the name that an image"),
        ("image: /data/{stem}.jpg", "image: /data/{stem}.jpg: a path below `root`; change `root`"),
        ("image: ../{stem}.jpg", "image: ../{stem}.jpg: a path below `root`"),
        ("mask: images/{split}/{stem}", "mask: images/{split}/{stem}: is the pattern of the images too"),
        (r'image: "a\n{stem}"', "has a line break or another control character"),
        ("image: {stem}", "YAML reads { as a mapping; write the pattern in quotes"),
        ("image: {split}/{stem}.jpg", "write a pattern that begins with { in quotes"),
        ("image: a/{stem}\nmask: b/{stem}", "splits: which images are the train split? Neither `image` nor `mask` has"),
        ("image: '{split}_{stem}'\nsplits: {train: a.txt, test: b.txt}", "image: {split}_{stem}: has {split} within a"),
        ("splits: {test: 1.5}", "splits.test: 1.5: a fraction is above 0 and below 1"),
        ("splits: {train: 0.8}", "splits.train: 0.8: expected a name; `test: 0.2` holds out a fifth"),
        ("splits: {dev: 0.2}", "splits.dev: 0.2: expected a name; without `dev`, a part of train is held out as dev"),
        ("splits: {test: 20}", "splits.test: 20: expected a name, or a fraction above 0 and below 1; write a name"),
        ("splits: {train: 2019}", "; write a name that is a number in quotes"),
        ("splits: {test: no}", "splits.test: False: YAML reads no, off and false like this; write the name in quotes"),
        ("splits: {train: ''}", "splits.train: '': use the name of a folder"),
    ],
)
def test_patterns_that_cannot_be_used_are_an_error(folder: Path, refusal: Refusal, text: str, complaint: str) -> None:
    message = refusal(lambda: dataset(folder, text))
    assert message.startswith(f"{folder / 'dataset.yaml'}: ")
    assert complaint in message


def test_unpaired_files_of_patterns_are_named(tmp_path: Path, refusal: Refusal) -> None:
    write(tmp_path, "{split}/{stem}.png", "{split}/{stem}_L.png")
    text = "image: '{split}/{stem}.png'\nmask: '{split}/{stem}_L.png'\n"
    (tmp_path / "train/tr1_L.png").unlink()
    assert f"{tmp_path}/train/tr1.png: no mask {tmp_path}/train/tr1_L.png" in refusal(
        lambda: dataset(tmp_path, text).digest
    )
    save(tmp_path / "train/tr1_L.png", labels(2))
    (tmp_path / "train/tr2.png").unlink()
    assert f"{tmp_path}/train/tr2_L.png: no image {tmp_path}/train/tr2.png" in refusal(
        lambda: dataset(tmp_path, text).digest
    )


def test_pictures_that_match_no_pattern_are_reported(tmp_path: Path) -> None:
    write(tmp_path, "photos/{stem}.png", "{split}/{stem}.png")
    save(tmp_path / "photos/extra.png", picture(9))
    save(tmp_path / "photos/preview.jpg", picture(9))
    opened = dataset(tmp_path, "image: photos/{stem}.png\nmask: '{split}/{stem}.png'\n")
    assert opened.digest
    assert opened.oddities == ["2 pictures (photos/extra.png first) not used: no pair of `image` and `mask`"]


# ---- lists -----------------------------------------------------------------------------------------------------------

VOC = "image: JPEGImages/{stem}.png\nmask: Labels/{stem}.png\nsplits: {train: lists/train.txt, test: lists/val.txt}\n"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    write(tmp_path, "JPEGImages/{stem}.png", "Labels/{stem}.png", [("train", 3), ("val", 2), ("other", 1)])
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train.txt").write_text("tr0\n\ntr1  \r\ntr2\n")
    (tmp_path / "lists/val.txt").write_text("\ufeffva0\nva1", encoding="utf-8")
    (tmp_path / "Labels/ot0.png").unlink()  # as in VOC, most images have no mask
    return tmp_path


def test_list_names_the_images_of_a_split(voc: Path) -> None:
    opened = dataset(voc, VOC)
    check(opened)
    assert [sample.name for sample in opened.samples("train")] == ["train/tr0", "train/tr1", "train/tr2"]
    assert opened.oddities == []


@pytest.mark.parametrize("line", ["{0}", "{0}.png", "JPEGImages/{0}.png", "JPEGImages/{0}.png Labels/{0}.png"])
@pytest.mark.parametrize("separator", [" ", "\t", ", "])
def test_line_is_a_stem_or_a_path_or_two(voc: Path, line: str, separator: str) -> None:
    for name, count in (("train", 3), ("val", 2)):
        lines = [line.format(f"{name[:2]}{number}").replace(" ", separator) for number in range(count)]
        (voc / f"lists/{name}.txt").write_text("\n".join(lines))
    check(dataset(voc, VOC))


def test_list_needs_no_folder_of_a_split_in_the_default_patterns(tmp_path: Path) -> None:
    write(tmp_path, "images/{stem}.png", "masks/{stem}.png")
    for split, stems in (("train", "tr0\ntr1\ntr2\n"), ("test", "te0\nte1\n")):
        (tmp_path / f"{split}.txt").write_text(stems)
    check(dataset(tmp_path, "splits: {train: train.txt, test: test.txt}\n"))


def test_list_names_files_below_root_alone(voc: Path, refusal: Refusal) -> None:
    (voc / "inner").mkdir()
    for name in ("JPEGImages", "Labels", "lists"):
        (voc / name).rename(voc / "inner" / name)
    write(voc, "outside/{stem}.png", "outside/{stem}_L.png", [("train", 1)])
    (voc / "inner/lists/train.txt").write_text("../outside/tr0.png ../outside/tr0_L.png\n")
    assert "lists/train.txt: line 1: no image" in refusal(lambda: dataset(voc / "inner", VOC).digest)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (
            "tr0\nmissing\n",
            "lists/train.txt: line 2: no image {0}/JPEGImages/missing.png; a line is an image's `{{stem}}`",
        ),
        ("tr0\not0\n", "lists/train.txt: line 2: {0}/JPEGImages/ot0.png: no mask {0}/Labels/ot0.png"),
        ("tr0\ntr0\n", "lists/train.txt: line 2: tr0 is listed twice"),
        ("tr0\nJPEGImages/tr0.png Labels/tr0.png\n", "line 2: JPEGImages/tr0.png Labels/tr0.png is listed twice"),
        ("/bin/sh /bin/sh\n", "lists/train.txt: line 1: no image"),
        ("\n", "lists/train.txt: lists no images"),
        ("tr0\nva0\n", "JPEGImages/va0.png: is in the test split and in the train split"),
    ],
)
def test_list_that_cannot_be_used_is_an_error(voc: Path, refusal: Refusal, lines: str, complaint: str) -> None:
    (voc / "lists/train.txt").write_text(lines)
    assert complaint.format(voc) in refusal(lambda: dataset(voc, VOC).digest)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".txt", r'"a\0b"', r'"a\0b.txt"', r'"a\nb"'])
def test_name_that_the_system_refuses_is_one_line(voc: Path, refusal: Refusal, name: str) -> None:
    assert refusal(lambda: dataset(voc, f"image: JPEGImages/{{split}}/{{stem}}\nsplits: {{train: {name}}}\n").digest)
    (voc / "lists/train.txt").write_text("x" * 300 + "\t" + "y" * 300)
    assert "lists/train.txt: line 1: no image" in refusal(lambda: dataset(voc, VOC).digest)


def test_missing_list_is_named(voc: Path, refusal: Refusal) -> None:
    (voc / "lists/val.txt").unlink()
    assert "lists/val.txt: No such file or directory; `splits` names lists" in refusal(lambda: dataset(voc, VOC).digest)


# ---- fractions -------------------------------------------------------------------------------------------------------


def flat(root: Path, count: int) -> None:
    for number in range(count):
        save(root / f"images/p{number // 2}_{number % 2}.png", picture(number))
        save(root / f"masks/p{number // 2}_{number % 2}.png", labels(number))


def test_fraction_holds_out_groups_of_one_folder(tmp_path: Path) -> None:
    flat(tmp_path, 20)
    opened = dataset(tmp_path, "splits: {test: 0.2}\ngroup: '^(p\\d+)_'\n")
    assert opened.digest
    train, test = opened.samples("train"), opened.samples("test")
    assert (len(train), len(test)) == (16, 4)
    assert not {sample.group for sample in train} & {sample.group for sample in test}
    assert {sample.name.partition("/")[0] for sample in test} == {"test"}
    fitted, dev = split_samples(opened, "dev", 0.25)
    assert (len(fitted), len(dev)) == (12, 4)
    assert describe_parts(opened, 0.25).endswith(
        ": train 16 images in 8 groups; dev 4 images in 2 groups held out of train by group; "
        "test 4 images in 2 groups held out of train by group"
    )


def test_fraction_that_unequal_groups_cannot_give_is_a_warning(tmp_path: Path) -> None:
    flat(tmp_path, 12)
    # Two groups: two images and ten. In the order of the names' digests the large one comes first.
    opened = dataset(tmp_path, "splits: {test: 0.2}\ngroup: '^(p0|p)'\n")
    assert (len(opened.samples("train")), len(opened.samples("test"))) == (2, 10)
    [warning] = file_warnings(opened)
    assert "the test split that is held out by group has 10 of 12 images" in warning


def test_pipe_among_images_is_skipped(tmp_path: Path) -> None:
    flat(tmp_path, 4)
    os.mkfifo(tmp_path / "images" / "pipe.png")
    assert len(list(files_below(tmp_path / "images"))) == 4


def test_fraction_holds_out_of_the_train_folder_and_val_is_dev(tmp_path: Path) -> None:
    write(tmp_path, "images/{split}/{stem}.png", "masks/{split}/{stem}.png", [("train", 5), ("val", 2)])
    opened = dataset(tmp_path, "splits: {test: 0.4}\n")
    assert opened.digest
    assert [len(opened.samples(split)) for split in ("train", "dev", "test")] == [3, 2, 2]


def test_added_groups_move_no_more_than_the_end_of_what_is_held_out() -> None:
    few = {f"g{number}": 1 for number in range(50)}
    more = few | {f"new{number}": 1 for number in range(10)}
    before, after = held_out_groups(few, 0.2), held_out_groups(more, 0.2)
    assert (len(before), len(after)) == (10, 12)
    kept = {group for group in after if group in few}
    assert kept <= before or before <= kept
    assert held_out_groups({"one": 3, "other": 1}, 0.99) in ({"one"}, {"other"})
    assert held_out_groups({"\udcff": 1, "b": 1}, 0.5)  # a name that is not UTF-8


def test_test_cannot_be_held_out_of_one_group(tmp_path: Path, refusal: Refusal) -> None:
    flat(tmp_path, 2)
    message = refusal(lambda: dataset(tmp_path, "splits: {test: 0.2}\ngroup: '^(p)'\n").digest)
    assert ": splits.test: 0.2: test cannot be held out of train, which is one group (p); write a `group`" in message


def test_flat_folder_without_splits_names_the_fraction(tmp_path: Path, refusal: Refusal) -> None:
    write(tmp_path, "images/{split}/{stem}.png", "masks/{split}/{stem}.png", [("train", 2)])
    assert "no such folder; the test split is not there; `image`, `mask` and `splits` say" in refusal(
        lambda: dataset(tmp_path).digest
    )


def test_pattern_that_matches_no_image_is_named(folder: Path, refusal: Refusal) -> None:
    assert f"{folder}/images/train: no images (.jpg); the train split is empty" in refusal(
        lambda: dataset(folder, "image: images/{split}/{stem}.jpg\n").digest
    )


DOCUMENTED = re.findall(
    r"^\| [^|]+ \| (?:default: )?`([^|]+\{stem\}[^|]*)` \| `([^|]+)` \|(?: `([^`|]*)`)? \|$",
    (Path(__file__).parents[2] / "docs/datasets.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize(("image", "mask", "splits"), DOCUMENTED)
def test_documented_layout_is_a_valid_description(tmp_path: Path, image: str, mask: str, splits: str) -> None:
    unlabelled = "unlabelled: sky\n" if mask.endswith(".json") else ""
    text = f"image: {image}\nmask: {mask}\nsplits: {splits or '{}'}\n{unlabelled}"
    assert dataset(tmp_path, text).classes == ("sky", "road", "tree")


def test_every_row_of_the_documented_layouts_is_tested() -> None:
    assert len(DOCUMENTED) == 11
