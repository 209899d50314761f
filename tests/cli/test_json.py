"""`--json`: every command that prints a result prints it as JSON, on stdout alone, with the fields of the reference."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.runs.folder import RunFolder
from tests.support.in_process import call
from tests.support.tiny_cell import make_dataset, run_arguments

REFERENCE = (Path(__file__).parents[2] / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")


def documented(command: str) -> set[str]:
    """The fields that the reference names for a command."""
    (row,) = (
        line for line in REFERENCE.splitlines() if line.startswith("| `") and f"`{command}`" in line.split("|")[1]
    )
    return set(re.findall(r"`(\w+)`", row.split("|")[2]))


def printed(*arguments: str | Path, code: int = 0) -> Any:
    found = call(*arguments, "--json")
    assert found.code == code, found.err
    return json.loads(found.out)


@pytest.fixture
def runs(whole: RunFolder, tmp_path: Path) -> Path:
    """A folder with the finished run of the tiny cell."""
    return Path(shutil.copytree(whole.path.parent, tmp_path / "runs"))


def test_run_prints_its_result(runs: Path, whole: RunFolder, colours: Path, tiny: Path) -> None:
    assert printed(*run_arguments(colours, tiny, runs)) == json.loads(whole.result_path.read_text())


def test_commands_that_write_files_name_them(runs: Path, whole: RunFolder, colours: Path, tmp_path: Path) -> None:
    image = colours / "images" / "test" / "0.png"
    (tmp_path / "broken.png").write_bytes(b"no image")
    out = tmp_path / "predictions"
    common = ["--runs", runs, "--out", out, "--device", "cpu"]
    found = printed("predict", whole.path.name, image, tmp_path / "broken.png", *common, code=1)
    assert set(found["written"]) == {str(path) for path in out.iterdir() if path.suffix == ".png"}
    assert [one["image"] for one in found["failed"]] == [str(tmp_path / "broken.png")] and found["warnings"] == []

    assert found.keys() | found["failed"][0].keys() <= documented("predict")

    found = printed("export", whole.path.name, "--runs", runs, "--out", tmp_path / "exported")
    assert set(found["written"]) == {str(path) for path in (tmp_path / "exported").iterdir()}

    found = printed("report", "--runs", runs, "--out", tmp_path / "report")
    assert Path(found["report"]).exists() and found["runs"] == {"done": 1} and len(found["answers"]) == 1
    assert found.keys() | found["answers"][0].keys() == documented("report")


def test_new_method_and_new_dataset_name_what_they_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (written,) = printed("new-method", "quite_new")["written"]
    assert (Path(written) / "pyproject.toml").exists()
    images = make_dataset(tmp_path / "colours")
    (images / "dataset.yaml").unlink()
    found = printed("new-dataset", images)
    assert found["written"] == [str(images / "dataset.yaml")] and any("images" in line for line in found["found"])


def test_sync_counts_and_search_names_trials(runs: Path, colours: Path, tiny: Path, tmp_path: Path) -> None:
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert printed("sync", "--runs", runs, "--tracking", tracking) == {"mirrored": 1, "current": 0, "failed": {}}

    arguments = run_arguments(colours, tiny, runs, "--trials", "2", "--space", "lr=0.001|0.01", "--quiet")
    found = printed("search", *arguments[1:], "--sampler", "grid", "--parameters", "lr")
    assert [trial["settings"]["lr"] for trial in found["trials"]] and len(found["trials"]) == 2
    (best,) = found["found"]
    assert Path(best["recipe"]).name == "best.yaml" and Path(found["folder"]).is_dir()
    assert found.keys() | best.keys() == documented("search")
    assert found["importances"] is None and found["objectives"] == ["miou"]


def test_lists_have_the_fields_of_the_reference(whole: RunFolder, tmp_path: Path) -> None:
    fields: set[str] = set()
    for kind in ("methods", "backbones", "datasets", "heads"):
        (first, *_) = printed("list", kind, "--data", tmp_path)
        fields |= first.keys()
    assert fields == documented("list methods") - {"methods", "backbones", "datasets", "heads", "budgets"}
    (finding, *_) = printed("doctor", "--runs", whole.path.parent, "--data", tmp_path)
    assert finding.keys() == documented("doctor")
