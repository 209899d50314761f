"""A plan shows, before anything runs, the parts of each dataset and what makes its scores misleading."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from harness.runs.store import RunStore
from studies.plan import make_plan
from studies.progress import describe
from studies.study import load_study
from tests.support.in_process import call
from tests.support.studies_at_hand import BUDGET, write_study


def lines_about(name: str, study: Path, runs: Path) -> list[str]:
    lines = [line.strip() for line in describe(make_plan(load_study(study), RunStore(runs), runs))]
    return [line for line in lines if line.removeprefix("warning: ").startswith(f"{name}: ")]


@pytest.fixture
def videos(colours: Path, tmp_path: Path) -> Path:
    """The tiny dataset with a dev split, in groups that train and test share: the images of one number."""
    shutil.copytree(colours, tmp_path / "videos")
    for kind in ("images", "masks"):
        (tmp_path / "videos" / kind / "val").mkdir()
        shutil.copy(colours / kind / "test" / "4.png", tmp_path / "videos" / kind / "val" / "9.png")
    with (tmp_path / "videos" / "dataset.yaml").open("a") as description:
        description.write("group: (.)")
    return tmp_path / "videos"


def test_plan_shows_the_parts_of_each_dataset_once(colours: Path, videos: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path / "s.yaml", colours, datasets=[str(colours), str(videos)])
    assert lines_about("colours", study, tmp_path / "runs") == [
        "colours: train 8 images in 8 groups; dev 2 images in 2 groups held out of train by group; "
        "test 5 images in 5 groups"
    ]
    assert lines_about("videos", study, tmp_path / "runs") == [
        "videos: train 8 images in 8 groups; dev 1 image in 1 group; test 5 images in 5 groups",
        "warning: videos: dev and test share 1 equal image file, such as dev/9 and test/4",
        "warning: videos: train and test share 5 groups (0, 1, 2 and 2 more): 5 of 5 images of test may resemble "
        "images of train",
    ]


def test_plan_warns_of_a_crop_below_half_of_a_side(colours: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path / "s.yaml", colours, budget={**BUDGET, "crop": [31, 64]})
    _, warning = lines_about("colours", study, tmp_path / "runs")
    assert warning.startswith("warning: colours: the crop [31, 64] covers 48 % of the images' height, 31 of 64 pixels")


def test_plan_command_prints_parts_and_warnings(videos: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path / "s.yaml", videos, methods=["linear"], seeds=1)
    output = call("compare", study, "--plan", "--runs", tmp_path / "runs")
    assert output.code == 0
    assert "  videos: train 8 images" in output.out and "  warning: videos: train and test share" in output.out


def test_plan_of_a_dataset_that_is_not_there_says_what_to_do(colours: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path / "s.yaml", colours, methods=["linear"], datasets=["ade20k", str(colours)], seeds=2)
    output = call("compare", study, "--plan", "--runs", tmp_path / "runs", "--data", tmp_path)
    assert output.code == 1
    assert "  2 no data, 2 to do\n" in output.out
    assert re.search(r"^  no data \(2\): dataset ade20k: not found .*; set --data or HARNESS_DATA$", output.out, re.M)
    assert [line.split()[-2:] for line in output.out.splitlines()[-2:]] == [["no", "data"], ["to", "do"]]


def test_plan_creates_no_run_folder_and_caches_in_one_that_is_there(colours: Path, tmp_path: Path) -> None:
    study, runs = write_study(tmp_path / "s.yaml", colours, methods=["linear"], seeds=1), tmp_path / "runs"
    first = call("compare", study, "--plan", "--runs", runs)
    assert first.code == 0 and not runs.exists()
    runs.mkdir()
    assert call("compare", study, "--plan", "--runs", runs) == first
    assert any(path.name.startswith("support-") for path in (runs / ".cache").iterdir())


def test_dataset_that_windows_do_not_fit_fails_its_own_cells_alone(colours: Path, tmp_path: Path) -> None:
    large = Path(shutil.copytree(colours, tmp_path / "large"))
    with (large / "dataset.yaml").open("a") as description:
        description.write("scale: [128, 128]")
    slide = {**BUDGET, "crop": [96, 96], "evaluation": "slide", "stride": [48, 48]}
    study = write_study(tmp_path / "s.yaml", colours, budget=slide, datasets=[str(colours), str(large)], seeds=1)
    plan = make_plan(load_study(study), RunStore(tmp_path / "runs"), tmp_path)
    assert [cell.state for cell in plan.cells] == ["failed", "failed", "to do", "to do"]
    (reason,) = {cell.reason for cell in plan.cells if cell.state == "failed"}
    assert reason is not None and reason.startswith(
        "budget s: the windows of `evaluation: slide`, [96, 96], are larger"
    )


def test_study_that_cannot_hold_out_dev_fails_before_it_runs(colours: Path, tmp_path: Path) -> None:
    one = Path(shutil.copytree(colours, tmp_path / "one"))
    with (one / "dataset.yaml").open("a") as description:
        description.write("group: ^()")
    study = write_study(tmp_path / "s.yaml", one, tune={"trials": 1, "parameters": ["lr"]}, seeds=1)
    plan = make_plan(load_study(study), RunStore(tmp_path / "runs"), tmp_path)
    assert {cell.state for cell in plan.cells} == {"failed"}
    assert all("dev cannot be held out of train" in str(cell.reason) for cell in plan.cells)
    assert any("dev none, since train is one group" in line for line in describe(plan))
