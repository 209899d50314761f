"""`harness new-dataset`: the file that it writes, what it says, and that it overwrites nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.in_process import call, refusal
from tests.support.tiny_files import labels, picture, save


@pytest.fixture
def street(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("test", 2)):
        for number in range(count):
            save(tmp_path / "street" / split / f"{number}.jpg", picture(number))
            save(tmp_path / "street" / split / f"{number}_mask.png", labels(number, classes=2))
    return tmp_path / "street"


def test_description_is_written_and_the_next_command_works(street: Path) -> None:
    output = call("new-dataset", street)
    assert (output.code, output.err) == (0, "")
    lines = output.out.splitlines()
    assert lines[0] == f"{street}/dataset.yaml"
    assert lines[1] == "  5 pairs: {split}/{stem}.jpg with {split}/{stem}_mask.png"
    command = lines[-1].split()
    assert command[:2] == ["harness", "check"]
    checked = call(*command[1:-1], street / "sheet.png", "--runs", street / "runs")
    assert checked.code == 0
    assert f"contact sheet: {street}/sheet.png" in checked.out


def test_description_elsewhere_names_the_folder(street: Path, tmp_path: Path) -> None:
    call("new-dataset", street, "--out", tmp_path / "mine.yaml")
    assert "\nroot: street\n" in (tmp_path / "mine.yaml").read_text()
    call("new-dataset", street, "--out", tmp_path / "other/mine.yaml")
    assert f"\nroot: {street}\n" in (tmp_path / "other/mine.yaml").read_text()
    assert call("check", tmp_path / "other/mine.yaml", "--runs", tmp_path / "runs").code == 0


def test_nothing_is_overwritten_and_nothing_half_written(street: Path) -> None:
    (street / "dataset.yaml").write_text("mine")
    assert "dataset.yaml: exists, and is not overwritten; remove it, or" in refusal("new-dataset", street)
    assert (street / "dataset.yaml").read_text() == "mine"
    (street / "other.yaml").symlink_to(street / "nothing")
    assert "other.yaml: exists, and is" in refusal("new-dataset", street, "--out", street / "other.yaml")
    assert "it is empty; name a file or folder" in refusal("new-dataset", "")
    assert "--out" in refusal("new-dataset", street, "--out", street / "other.txt")
    (street / "empty").mkdir()
    assert "no images with masks" in refusal("new-dataset", street / "empty")
    assert list((street / "empty").iterdir()) == []


def test_commands_that_miss_a_description_name_this_one(street: Path) -> None:
    output = call("check", f"{street}/", "--runs", street / "runs")
    assert output.code == 1
    assert f"no such file: {street}/dataset.yaml; `harness new-dataset {street}` writes one" in output.err
