"""`harness check PATH`: what a dataset holds, its warnings, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.cli.check_dataset import is_dataset
from tests.support.in_process import call, refusal
from tests.support.tiny_files import picture, save


@pytest.fixture
def street(tmp_path: Path) -> Path:
    root = tmp_path / "street"
    for split, values in (("train", [[0, 1], [0, 2]]), ("test", [[0, 0]])):
        for number, (left, right) in enumerate(values):
            mask = np.full((10, 10), left, np.uint8)
            mask[:, 8:] = right
            mask[0, 0] = 255
            save(root / "images" / split / f"{number}.png", picture(number + len(split), 10, 10))
            save(root / "masks" / split / f"{number}.png", mask)
    (root / "dataset.yaml").write_text("classes: [sky, road, tree]\n")
    return root


@pytest.mark.parametrize("name", ["", "dataset.yaml"])
def test_dataset_is_described_with_the_shares_of_its_classes(street: Path, name: str) -> None:
    output = call("check", street / name, "--runs", street / "runs")
    assert (output.code, output.err) == (0, "")
    lines = [line.split() for line in output.out.splitlines()]
    assert ["images", "2", "1"] in lines
    assert ["sky", "79.00", "99.00"] in lines
    assert ["road", "10.00", "0"] in lines
    assert ["ignored", "1.00", "1.00"] in lines
    assert "warning: street: classes road, tree never occur in test: not scored" in output.out


def test_dataset_is_described_as_json(street: Path) -> None:
    (found,) = json.loads(call("check", street, "--json", "--runs", street / "runs").out)
    assert found["working_sizes"] == {"median": [10, 10], "largest": [10, 10]}
    assert found["splits"]["test"]["shares"] == {"sky": 0.99, "road": 0.0, "tree": 0.0}
    assert len(found["warnings"]) == 1


def test_dataset_that_cannot_be_used_is_an_error_and_the_others_are_described(street: Path) -> None:
    output = call("check", street / "other.yaml", street, "--runs", street / "runs")
    assert output.code == 1
    assert output.err.count("\n") == 1
    assert "no such file" in output.err
    assert output.out.startswith("street  ")
    (street / "masks/train/0.png").write_bytes(b"")
    output = call("check", street, "--runs", street / "runs")
    assert (output.code, output.out) == (1, "")
    assert f"error: dataset street: {street}/masks/train/0.png: not an image file\n" == output.err


def test_contact_sheet_shows_each_split_with_its_labels_and_the_classes(street: Path) -> None:
    (street / "dataset.yaml").write_text("classes: {sky: [255, 0, 0], road: [0, 255, 0], tree: [0, 0, 255]}\n")
    for path in street.glob("images/*/*"):
        save(path, picture(0, 10, 10) * 0)
    output = call("check", street, "--sheet", street / "sheet.png", "--runs", street / "runs")
    assert (output.code, output.err) == (0, "")
    sheet = np.asarray(Image.open(street / "sheet.png"))
    shares = {name: (sheet == colour).all(axis=2).sum() / 300**2 for name, colour in (
        ("black", (0, 0, 0)), ("sky", (153, 0, 0)), ("road", (0, 153, 0)), ("tree", (0, 0, 153)))}  # fmt: skip
    # Images of 10 x 10 pixels become 300 x 300: the shares are those of the three masks, at an opacity of 0.6.
    assert shares["sky"] == pytest.approx(0.79 + 0.79 + 0.99)
    assert shares["road"] == shares["tree"] == pytest.approx(0.2)
    assert 3.03 < shares["black"] < 3.1  # three images, three ignored pixels, and the text
    legend = sheet[-30:]
    assert all((legend == colour).all(axis=2).any() for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))


def test_contact_sheet_overwrites_nothing(street: Path) -> None:
    taken = save(street / "taken.png", picture())
    before = taken.read_bytes()
    assert "taken.png: exists, and is not overwritten" in refusal("check", street, "--sheet", taken)
    assert taken.read_bytes() == before
    assert "name a file that ends in .png" in refusal("check", street, "--sheet", street / "sheet.jpg")
    assert "one file for 2 datasets" in refusal("check", street, f"{street}/", "--sheet", street / "new.png")
    assert "--sheet /proc/new.png: " in refusal("check", street, "--sheet", "/proc/new.png", "--runs", street / "runs")
    assert "is for datasets" in refusal("check", "lora", "--sheet", street / "new.png")
    assert not (street / "new.png").exists()


def test_parts_that_are_held_out_are_printed(street: Path) -> None:
    patterns = "image: images/train/{stem}\nmask: masks/train/{stem}\n"
    (street / "dataset.yaml").write_text(f"classes: [sky, road, tree]\n{patterns}splits: {{test: 0.5}}\n")
    output = call("check", street, "--runs", street / "runs")
    assert "\ndev: none, since train is one group\ntest: held out of train by group\n" in output.out


def test_methods_and_datasets_are_checked_apart(street: Path) -> None:
    assert "check one after the other" in refusal("check", "lora", street)


def test_folder_of_the_name_of_a_method_is_not_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lora_x").mkdir()
    (tmp_path / "lora/src").mkdir(parents=True)
    (tmp_path / "street/images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "lora_x: no such method" in refusal("check", "lora_x")
    assert not is_dataset("lora")
    output = call("check", "street", "--runs", tmp_path / "runs")
    assert output.code == 1
    assert "street holds no dataset.yaml; `harness new-dataset street` writes one" in output.err
