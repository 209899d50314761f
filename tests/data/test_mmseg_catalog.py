"""mmsegmentation's benchmarks: the catalog agrees with the installed mmseg, and datasets are read as mmseg does."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from harness.data import mmseg_catalog
from harness.data.base import IGNORE_INDEX
from harness.data.catalog import open_dataset
from harness.data.masks import ILLEGAL
from harness.data.splits import split_samples
from harness.util.quiet import quiet_imports
from tests.support.tiny_files import labels, picture, save

ADE = Path("ade/ADEChallengeData2016")
CHASE = Path("CHASE_DB1")
VOC = Path("VOCdevkit/VOC2012")
CHASE_FILES = Path(__file__).parents[2] / "../shared/data/chase_db1"


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


@pytest.fixture(scope="module")
def installed() -> dict[str, dict]:
    """The dataset configs of the installed mmseg, by name; configs of another crop size are not another dataset."""
    with quiet_imports():
        import mmseg
        from mmengine.config import Config

    files = sorted((Path(mmseg.__file__).parent / ".mim/configs/_base_/datasets").glob("*.py"))
    named = {path.stem.replace("-", "_"): path for path in files}
    return {name: Config.fromfile(path).to_dict() for name, path in named.items() if not re.search(r"_\d+x\d+$", name)}


def unwrapped(config: dict) -> list[dict]:
    """Dataset configs out of their `RepeatDataset` and `ConcatDataset`."""
    inner = [config["dataset"]] if "dataset" in config else config.get("datasets")
    return [config] if inner is None else [one for member in inner for one in unwrapped(member)]


def test_catalog_covers_the_datasets_of_the_installed_mmseg(installed: dict[str, dict]) -> None:
    assert set(mmseg_catalog.names()) == set(installed) - set(mmseg_catalog.excluded())


@pytest.mark.parametrize("name", mmseg_catalog.names())
def test_entry_matches_the_installed_mmseg(installed: dict[str, dict], name: str, monkeypatch) -> None:
    with quiet_imports():
        from mmengine import fileio
        from mmseg.registry import DATASETS
        from mmseg.utils import register_all_modules

        register_all_modules()
    for module, name_ in ((fileio, "exists"), (os.path, "isfile")):  # some classes look for their files at once
        monkeypatch.setattr(module, name_, lambda *_, **__: True)
    entry, root = mmseg_catalog.entry(name), Path("data") / mmseg_catalog.entry(name).root
    # Most configs test on the validation split, whose labels are public.
    for split, part in (("train", "train"), *((("dev", "val"),) if entry.dev else ()), ("test", "test")):
        configs = unwrapped(installed[name][f"{part}_dataloader"]["dataset"])
        for source, config in zip(entry.sources(split), configs, strict=True):
            real = DATASETS.build({**config, "pipeline": [], "lazy_init": True})
            assert Path(real.data_prefix["img_path"]) == root / source.images
            assert Path(real.data_prefix["seg_map_path"]) == root / source.masks
            assert (Path(real.ann_file) if real.ann_file else None) == (source.names and root / source.names)
            assert (real.img_suffix, real.seg_map_suffix) == (entry.image_suffix, entry.mask_suffix)
            assert real.reduce_zero_label == entry.reduce_zero_label
            classes = {name: tuple(colour) for name, colour in entry.classes.items() if name not in entry.ignored}
            assert list(real.metainfo["classes"]) == list(classes)
            assert [tuple(colour) for colour in real.metainfo["palette"]] == list(classes.values())
            assert list(real.METAINFO["classes"]) == list(entry.classes)
    (scale,) = (step["scale"] for step in configs[0]["pipeline"] if step["type"] == "Resize")  # that of evaluation
    assert (max(scale), min(scale)) == entry.scale


@pytest.mark.parametrize("name", mmseg_catalog.names())
def test_missing_dataset_error_names_the_expected_place(tmp_path, refusal, name):
    message = refusal(lambda: opened(name, tmp_path))
    assert message.startswith(f"dataset {name}: not found under {tmp_path}; expected {tmp_path}/")
    assert message.endswith("; set --data or HARNESS_DATA")


def test_missing_files_error_names_images_and_masks_of_both_splits(tmp_path, refusal):
    message = refusal(lambda: opened("ade20k", tmp_path))
    for part in ("images/training/**/*.jpg", "annotations/training/**/*.png", "images/validation", "(test)"):
        assert part in message


def test_excluded_dataset_has_a_reason(tmp_path, refusal):
    assert "depth estimation" in refusal(lambda: opened("nyu", tmp_path))


def test_ade20k_ignores_label_zero(ade):
    dataset = opened("ade20k", ade)
    assert len(dataset.digest) == 64
    assert (len(dataset.classes), len(dataset.palette), dataset.scale) == (150, 150, (2048, 512))
    assert [sample.name for sample in dataset.samples("test")] == ["test/a"]
    mask = dataset.load(dataset.samples("train")[0]).mask
    assert mask[0, :4].tolist() == [IGNORE_INDEX, 0, 149, IGNORE_INDEX]


def test_label_beyond_the_classes_is_named_with_its_file_value(ade, refusal):
    path = save(ade / ADE / "annotations/training/a.png", np.full((12, 16), 151, np.uint8))
    message = refusal(lambda: opened("ade20k", ade).digest)
    assert message == (
        f"dataset ade20k: {path}: label 151 at (0, 0) but 150 classes (1..150) and 0 and 255 = ignore; "
        "such labels are in 1 of 2 masks"
    )


def test_image_without_a_mask_is_named(ade, refusal):
    (ade / ADE / "annotations/training/a.png").unlink()
    message = refusal(lambda: opened("ade20k", ade).digest)
    assert message == f"dataset ade20k: {ade / ADE}/annotations/training/a.png: No such file or directory"


def test_empty_split_is_named(ade, refusal):
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
    assert "the masks of train hold only class 0" in refusal(lambda: opened("chase_db1", tmp_path).digest)


def test_chase_db1_of_the_catalog_equals_its_description_as_a_folder(tmp_path):
    if not CHASE_FILES.is_dir():
        pytest.skip("CHASE_DB1 is not in ../shared/data/chase_db1")
    root = tmp_path / CHASE
    for split, part in (("training", "train"), ("validation", "test")):
        for kind, target in (("images", "images/{}/{}.png"), ("masks", "annotations/{}/{}_1stHO.png")):
            for source in (CHASE_FILES / kind / part).iterdir():
                link = root / target.format(split, source.stem)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source.resolve())  # images are JPEG files, which are recognised by what they hold
    (root / "dataset.yaml").write_text(
        "classes: [background, vessel]\nscale: [999, 960]\n"
        "image: images/{split}/{stem}.png\nmask: annotations/{split}/{stem}_1stHO.png\n"
        "splits: {train: training, test: validation}\n"
    )
    (tmp_path / "plain.yaml").write_text(
        f"root: {CHASE_FILES.resolve()}\nclasses: [background, vessel]\nscale: [999, 960]\n"
    )
    catalog, *folders = (opened(name, tmp_path) for name in ("chase_db1", f"{root}/", f"{tmp_path}/plain.yaml"))
    assert {catalog.digest} == {folder.digest for folder in folders}
    for split, count in (("train", 20), ("test", 8)):
        samples = [dataset.samples(split) for dataset in (catalog, *folders)]
        assert [len(one) for one in samples] == [count] * 3
        for one, *others in zip(*samples, strict=True):
            expected = catalog.load(one)
            for folder, other in zip(folders, others, strict=True):
                assert other.name == one.name
                for found, part in zip(folder.load(other), expected, strict=True):
                    np.testing.assert_array_equal(found, part)


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


def test_refuge_is_selected_on_validation_and_reported_on_test(tmp_path, refusal):
    for number, split in enumerate(("training", "validation", "test")):
        assert "not found" in refusal(lambda: opened("refuge", tmp_path))
        save(tmp_path / "REFUGE/images" / split / "a.png", picture(number))
        save(tmp_path / "REFUGE/annotations" / split / "a.png", labels(number))
    dataset = opened("refuge", tmp_path)
    assert dataset.digest
    for part, evaluated in (("dev", "validation"), ("report", "test")):
        (fitted,), (held,) = split_samples(dataset, part, 0.2)
        assert [Path(sample.source.image).parent.name for sample in (fitted, held)] == ["training", evaluated]


def test_image_listed_in_two_splits_is_an_error(voc, refusal):
    (voc / VOC / "ImageSets/Segmentation/val.txt").write_text("v0\nt1\n")
    message = refusal(lambda: opened("pascal_voc12", voc).digest)
    assert message.endswith("JPEGImages/t1.jpg: is in the test split and in the train split")


def test_coco_stuff_is_its_larger_edition(tmp_path, refusal):
    assert refusal(lambda: opened("coco_stuff", tmp_path)).startswith("dataset coco_stuff164k: not found")
