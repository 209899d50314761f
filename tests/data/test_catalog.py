"""Datasets by name, the cost of opening them, and the dev split."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from harness.data.base import Pair, Sample, SegmentationDataset, Split, WorkingSizes
from harness.data.catalog import dataset_names, open_dataset
from harness.data.fit import describe_parts, warnings
from harness.data.splits import split_samples
from harness.spec import Budget

REPOSITORY = Path(__file__).parents[2]
CAMVID = REPOSITORY / "../shared/data/camvid"
CAMVID_CLASSES = "[sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist]"


class Groups(SegmentationDataset):
    """A dataset with one sample per group of train and of dev."""

    name = "groups"
    classes, palette, digest = ("a", "b"), ((0, 0, 0), (1, 1, 1)), ""
    working_sizes = WorkingSizes((1, 1), (1, 1))

    def __init__(self, train: Sequence[str], dev: Sequence[str] = ()) -> None:
        self._groups = {"train": train, "dev": dev, "test": ["elsewhere"]}

    def samples(self, split: Split) -> list[Sample]:
        return [Sample(f"{split}/{n:03}", group, None) for n, group in enumerate(self._groups[split])]

    def load(self, sample: Sample) -> Pair:
        return Pair(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8))


def make_budget(crop: tuple[int, int]) -> Budget:
    return Budget(name="test", steps=1, batch_size=1, crop=crop)


@pytest.mark.parametrize("name", ["shapes", "{root}", "{root}/dataset.yaml"])
def test_folder_opens_by_name_and_by_path(folder, tmp_path, name):
    dataset = open_dataset(name.format(root=folder), tmp_path, tmp_path / "cache")
    assert (dataset.name, dataset.classes) == ("shapes", ("sky", "road", "tree"))


def test_yaml_file_under_data_opens_by_its_stem(folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("root: shapes\nclasses: [a, b, c]\n")
    dataset = open_dataset("mine", tmp_path, tmp_path / "cache")
    assert dataset.name == "mine"
    assert len(dataset.samples("train")) == 4


def test_unknown_name_gets_the_nearest_known_one(folder, tmp_path, refusal):
    assert "did you mean shapes" in refusal(lambda: open_dataset("shaps", tmp_path, tmp_path))
    assert "did you mean cityscapes?" in refusal(lambda: open_dataset("cityscape", tmp_path, tmp_path))


def test_missing_path_is_named(tmp_path, refusal):
    path = tmp_path / "no" / "dataset.yaml"
    assert refusal(lambda: open_dataset(str(path), tmp_path, tmp_path)).endswith(f"no such file: {path}")


def test_folder_without_a_description_is_named(tmp_path, refusal):
    (tmp_path / "bare").mkdir()
    assert "bare holds no dataset.yaml" in refusal(lambda: open_dataset("bare", tmp_path, tmp_path))


def test_listing_shows_which_datasets_are_present(folder, tmp_path):
    listed = {entry.name: entry for entry in dataset_names(tmp_path)}
    assert listed["shapes"].kind == "folder" and listed["shapes"].present
    assert listed["ade20k"].kind == "mmsegmentation" and not listed["ade20k"].present
    assert listed["ade20k"].location == str(tmp_path / "ade" / "ADEChallengeData2016")
    assert listed["landcover"].kind == "landcover"


def test_listing_opening_and_digest_do_not_import_torch(folder, tmp_path):
    script = f"""
import json, sys
from pathlib import Path
from harness.data.catalog import dataset_names, open_dataset
from harness.data.fit import describe_parts, warnings
from harness.data.splits import split_samples
data = Path({str(tmp_path)!r})
present = {{entry.name for entry in dataset_names(data) if entry.present}} & {{"shapes", "landcover"}}
for name in present:
    dataset = open_dataset(name, data, data / "cache")
    dataset.digest, dataset.classes, split_samples(dataset, "dev", 0.2)
print(json.dumps(["torch" in sys.modules, sorted(present)]))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    imported, present = json.loads(done.stdout)
    assert not imported
    assert "shapes" in present


def test_report_part_is_all_of_train_and_all_of_test():
    dataset = Groups("aabbcc")
    fitted, evaluated = split_samples(dataset, "report", 0.2)
    assert (fitted, evaluated) == (dataset.samples("train"), dataset.samples("test"))


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_dev_split_is_whole_groups_of_at_least_the_fraction(fraction):
    dataset = Groups([str(number // 5) for number in range(100)])
    fitted, held = split_samples(dataset, "dev", fraction)
    assert sorted([*fitted, *held], key=lambda sample: sample.name) == dataset.samples("train")
    assert not {sample.group for sample in fitted} & {sample.group for sample in held}
    assert fitted
    # One group of five less would not have been enough; the last group stays whatever the fraction.
    assert fraction * 100 <= len(held) < fraction * 100 + 5 or len(held) == 95


def test_dev_split_is_the_same_on_every_machine():
    fitted, held = split_samples(Groups("abcd"), "dev", 0.25)
    # sha256 of "d" begins with 18, of "c" with 2e, of "b" with 3e, of "a" with ca.
    assert ([sample.group for sample in held], [sample.group for sample in fitted]) == (
        ["d"],
        ["a", "b", "c"],
    )


def test_one_group_cannot_be_split(refusal):
    message = refusal(lambda: split_samples(Groups("aaaa"), "dev", 0.2))
    assert message.startswith(
        "dataset groups: dev cannot be held out of train, which is one group (a); write a `group`"
    )


def test_own_dev_split_is_evaluated_on_and_never_trained_on():
    dataset = Groups("aabb", dev="cd")
    train, dev, test = (dataset.samples(split) for split in ("train", "dev", "test"))
    assert split_samples(dataset, "dev", 0.2) == (train, dev)
    assert split_samples(dataset, "report", 0.2) == (train, test)


def test_own_dev_split_needs_no_second_group_in_train():
    assert len(split_samples(Groups("aaaa", dev="b"), "dev", 0.2)[0]) == 4


@pytest.fixture
def camvid(tmp_path) -> SegmentationDataset:
    """The shipped studies' CamVid: its three official splits."""
    if not CAMVID.is_dir():
        pytest.skip("CamVid is not in ../shared/data/camvid")
    description = tmp_path / "camvid.yaml"
    description.write_text(
        f"root: {CAMVID.resolve()}\nclasses: {CAMVID_CLASSES}\nsplits: {{train: train, dev: val, test: test}}\n"
        r"group: '^(\w+_f?\d+)\d{3}$'"
        "\nscale: [240, 180]\n"
    )
    return open_dataset(str(description), tmp_path, tmp_path / "cache")


def test_camvid_is_trained_on_train_selected_on_val_and_reported_on_test(camvid):
    assert len(camvid.digest) == 64
    sizes = {part: [len(samples) for samples in split_samples(camvid, part, 0.2)] for part in ("dev", "report")}
    assert sizes == {"dev": [367, 101], "report": [367, 233]}
    assert {sample.name.split("_")[0] for sample in camvid.samples("dev")} == {"dev/0016E5"}
    image, mask = camvid.load(camvid.samples("train")[0])
    assert (image.shape, mask.shape) == ((360, 480, 3), (360, 480))


def test_camvid_shares_half_a_minute_of_one_clip_between_train_and_test(camvid):
    assert describe_parts(camvid, 0.2) == (
        "camvid: train 367 images in 15 groups; dev 101 images in 2 groups; test 233 images in 9 groups"
    )
    (_, to_test) = warnings(camvid, make_budget(crop=(180, 240)))
    assert to_test.startswith("camvid: train and test share 1 group (0001TP_008): 15 of 233 images of test")
    assert len(warnings(camvid, make_budget(crop=(96, 128)))) == 2  # just above half
    assert "40 % of the images' width, 96 of 240 pixels" in warnings(camvid, make_budget(crop=(96, 96)))[2]
