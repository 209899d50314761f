"""The catalogue of mmsegmentation: read as mmsegmentation itself reads it, without importing it."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

from harness.data import mmseg_catalog
from harness.data.base import IGNORE_INDEX
from harness.data.catalog import open_dataset
from harness.data.file_pairs import ILLEGAL
from harness.util.quiet import quiet_imports
from tests.support.tiny_files import labels, picture, save

ADE = Path("ade/ADEChallengeData2016")
CHASE = Path("CHASE_DB1")
VOC = Path("VOCdevkit/VOC2012")


def opened(name: str, data: Path):
    return open_dataset(name, data, data / "cache")


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    for number, split in enumerate(("training", "validation")):
        save(tmp_path / ADE / "images" / split / "a.jpg", picture(number))
        values = labels(number, classes=151)
        values[0, :4] = (0, 1, 150, 255)
        save(tmp_path / ADE / "annotations" / split / "a.png", values)
    return tmp_path


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / VOC
    lists = {"train": ["t0", "t1"], "val": ["v0"], "aug": ["x0"]}
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for split, stems in lists.items():
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            save(root / "JPEGImages" / f"{stem}.jpg", picture())
            folder = "SegmentationClassAug" if split == "aug" else "SegmentationClass"
            save(root / folder / f"{stem}.png", labels(0, classes=21))
    save(root / "JPEGImages" / "unlisted.jpg", picture())
    return tmp_path


def test_the_catalogue_is_one_name_a_dataset():
    names = mmseg_catalog.names()
    assert {"ade20k", "cityscapes", "coco_stuff10k", "coco_stuff164k", "pascal_voc12_aug", "stare"} <= set(names)
    assert not {"cityscapes_769x769", "ade20k_640x640", "nyu_512x512", "levir_256x256"} & set(names)
    assert not set(mmseg_catalog.EXCLUDED) & set(names)


def test_what_is_read_from_the_source_is_what_the_classes_say_when_imported():
    with quiet_imports():
        import mmseg.datasets as real

    for name in mmseg_catalog.names():
        kind = mmseg_catalog._datasets(name, "val")[0]["type"]
        facts, cls = mmseg_catalog._class_facts(kind), getattr(real, kind)
        assert facts["METAINFO"] == cls.METAINFO
        assert len(facts["METAINFO"]["palette"]) == len(facts["METAINFO"]["classes"])
        for argument in ("img_suffix", "seg_map_suffix", "reduce_zero_label"):
            # REFUGE takes none of them: it hands constants to its base.
            declared = inspect.signature(cls.__init__).parameters.get(argument)
            if declared is not None:
                assert facts[argument] == declared.default, (name, argument)
    assert mmseg_catalog._class_facts("REFUGEDataset")["img_suffix"] == ".png"


@pytest.mark.parametrize("name", mmseg_catalog.names())
def test_every_dataset_that_is_missing_says_where_it_is_expected(tmp_path, refusal, name):
    message = refusal(lambda: opened(name, tmp_path))
    assert message.startswith(f"--dataset {name}: not found under {tmp_path}; expected {tmp_path}/")
    assert message.endswith("; set --data or HARNESS_DATA")


def test_a_missing_layout_names_images_and_masks_of_both_splits(tmp_path, refusal):
    message = refusal(lambda: opened("ade20k", tmp_path))
    for part in ("images/training/**/*.jpg", "annotations/training/**/*.png", "images/validation", "(test)"):
        assert part in message


def test_an_excluded_dataset_says_why(tmp_path, refusal):
    assert "depth estimation" in refusal(lambda: opened("nyu", tmp_path))


def test_ade20k_ignores_label_zero_and_begins_at_one(ade):
    dataset = opened("ade20k", ade)
    assert len(dataset.digest) == 64
    assert (len(dataset.classes), len(dataset.palette), dataset.scale) == (150, 150, (2048, 512))
    assert [sample.name for sample in dataset.samples("test")] == ["test/a"]
    mask = dataset.load(dataset.samples("train")[0]).mask
    assert mask[0, :4].tolist() == [IGNORE_INDEX, 0, 149, IGNORE_INDEX]


def test_a_label_beyond_the_classes_is_named_as_the_file_holds_it(ade, refusal):
    path = save(ade / ADE / "annotations/training/a.png", np.full((12, 16), 151, np.uint8))
    message = refusal(lambda: opened("ade20k", ade).digest)
    assert message == f"--dataset ade20k: {path}: label 151 at (0, 0) but 150 classes (1..150) and 0 and 255 = ignore"


def test_an_image_without_its_mask_is_named(ade, refusal):
    (ade / ADE / "annotations/training/a.png").unlink()
    message = refusal(lambda: opened("ade20k", ade).digest)
    assert message == f"--dataset ade20k: {ade / ADE}/annotations/training/a.png: No such file or directory"


def test_an_empty_split_is_named(ade, refusal):
    (ade / ADE / "images/validation/a.jpg").unlink()
    assert refusal(lambda: opened("ade20k", ade).digest).endswith("no *.jpg; the test split is empty")


def test_chase_db1_pairs_by_suffix_and_refuses_unconverted_masks(tmp_path, refusal):
    for split in ("training", "validation"):
        save(tmp_path / CHASE / "images" / split / "Image_01L.png", picture())
        save(tmp_path / CHASE / "annotations" / split / "Image_01L_1stHO.png", labels(0, classes=2))
    dataset = opened("chase_db1", tmp_path)
    assert dataset.digest
    assert (dataset.classes, dataset.scale) == (("background", "vessel"), (999, 960))
    np.testing.assert_array_equal(dataset.load(dataset.samples("train")[0]).mask, labels(0, classes=2))
    save(tmp_path / CHASE / "annotations/training/Image_01L_1stHO.png", labels(0, classes=2) * 255)
    assert "the masks of train hold class 0 alone" in refusal(lambda: opened("chase_db1", tmp_path).digest)


def test_voc_takes_the_listed_images_and_aug_adds_its_own(voc):
    plain, augmented = opened("pascal_voc12", voc), opened("pascal_voc12_aug", voc)
    assert [sample.name for sample in plain.samples("train")] == ["train/t0", "train/t1"]
    assert [sample.name for sample in augmented.samples("train")] == ["train/t0", "train/t1", "train/x0"]
    assert plain.samples("test") == augmented.samples("test")
    assert augmented.digest != plain.digest


def test_files_in_a_folder_of_a_scene_are_one_group(tmp_path):
    root = tmp_path / "cityscapes"
    for split, city in (("train", "ulm"), ("train", "jena"), ("val", "bonn")):
        for frame in range(2):
            stem = f"{split}/{city}/{city}_{frame}"
            save(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", picture())
            save(root / "gtFine" / f"{stem}_gtFine_labelTrainIds.png", labels(0, classes=19))
    dataset = opened("cityscapes", tmp_path)
    assert dataset.digest
    assert {sample.group for sample in dataset.samples("train")} == {"ulm", "jena"}


def test_classes_that_a_config_leaves_out_are_ignored():
    table = mmseg_catalog.label_table(("a", "b", "c"), ("a", "c"), reduce_zero_label=False)
    assert table[:4].tolist() == [0, IGNORE_INDEX, 1, ILLEGAL]


def test_coco_stuff_is_its_larger_edition(tmp_path, refusal):
    assert refusal(lambda: opened("coco_stuff", tmp_path)).startswith("--dataset coco_stuff164k: not found")
