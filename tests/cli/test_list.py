"""`harness list`: every list as a table and as JSON, patterns, details, local weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.in_process import call, refusal

LISTED = ("methods", "backbones", "datasets", "heads", "budgets", "runs")


@pytest.mark.parametrize("what", LISTED)
def test_every_list_is_a_table_and_json(what: str, tmp_path: Path) -> None:
    places = ("--runs", tmp_path / "runs", "--data", tmp_path / "data")
    output = call("list", what, "--json", *places)
    assert (output.code, output.err) == (0, "")
    rows = json.loads(output.out)
    table = call("list", what, *places)
    assert (table.code, table.err) == (0, "")
    if what == "runs":
        assert (rows, table.out) == ([], "none\n")
    else:
        assert rows
        assert all(row["name"] in table.out for row in rows)
    assert not (tmp_path / "runs").exists()


def test_every_hyperparameter_is_described() -> None:
    methods = {row["name"]: row for row in json.loads(call("list", "methods", "--json").out)}
    for method in methods.values():
        assert method["summary"]
        assert method["source"]
        for field in method["hyperparameters"]:
            assert field.keys() == {"name", "type", "default", "bounds", "help", "search"}
            assert field["help"]
            assert field["default"] is not None
            if field["type"] in ("number", "integer"):
                assert {"minimum", "exclusiveMinimum"} & field["bounds"].keys()
                assert {"maximum", "exclusiveMaximum"} & field["bounds"].keys()
    (hidden,) = (field for field in methods["spm"]["hyperparameters"] if field["name"] == "hidden")
    assert (hidden["default"], hidden["bounds"]) == (32, {"minimum": 1, "maximum": 1024})
    assert hidden["search"] == [8, 64, "log"]


def test_every_field_of_a_budget_is_explained() -> None:
    lines = call("list", "budgets", "small").out.splitlines()
    fields = {line.split()[0]: line for line in lines[1:]}
    assert {"steps", "crop", "drop_path", "auxiliary_head", "clip_norm", "dev_fraction"} <= fields.keys()
    assert all(len(line.split()) > 2 for line in fields.values())
    assert "weight of the loss of an FCN head" in fields["auxiliary_head"]


def test_datasets_say_whether_they_are_present(tmp_path: Path, colours: Path) -> None:
    rows = {row["name"]: row for row in json.loads(call("list", "datasets", "--json", "--data", colours.parent).out)}
    assert (rows["colours"]["kind"], rows["colours"]["present"]) == ("folder", True)
    assert (rows["ade20k"]["kind"], rows["ade20k"]["present"]) == ("mmsegmentation", False)


def test_finished_and_damaged_runs_are_listed(finished: list[str | Path], tmp_path: Path) -> None:
    runs = finished[finished.index("--runs") + 1]
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / ("0" * 16)).mkdir()
    output = call("list", "runs", "--runs", tmp_path / "runs")
    assert (output.code, output.err) == (0, "")
    assert "spm(hidden=8)" in output.out
    assert re.search(r"^0{16} .* damaged: .*spec.yaml is missing or damaged$", output.out, re.MULTILINE)


def test_pattern_selects_names() -> None:
    names = [row["name"] for row in json.loads(call("list", "backbones", "*resnet1*", "--json").out)]
    assert "resnet101" in names and all("resnet1" in name for name in names)
    assert "\nfpn " in call("list", "heads", "f*").out


def test_pattern_without_match_offers_similar_names() -> None:
    assert refusal("list", "methods", "spn") == "list methods spn: no match; did you mean spm?"
    assert refusal("list", "backbones", "resnest").endswith(": no match; did you mean '*resnest*'?")
    assert refusal("list", "backbones", "*resnet111*").startswith("list backbones *resnet111*: no match; did you mean ")


def test_methods_are_one_line_each_and_one_method_is_shown_in_full() -> None:
    lines = call("list", "methods").out.splitlines()
    assert len(lines) == 1 + len(json.loads(call("list", "methods", "--json").out))
    (line,) = (line for line in lines if line.startswith("spm "))
    details = call("list", "methods", "spm").out
    assert line.split(maxsplit=1)[1] in details
    assert re.search(r"^  hidden +32 +integer +>= 1, <= 1024 +8, 64, log ", details, re.MULTILINE)


def test_runs_are_selected_by_state_and_cell(finished: list[str | Path]) -> None:
    runs = finished[finished.index("--runs") + 1]
    for pattern, count in (("spm", 1), ("*resnet", 1), ("done", 1)):
        assert len(json.loads(call("list", "runs", pattern, "--json", "--runs", runs).out)) == count
    assert refusal("list", "runs", "failed", "--runs", runs).startswith("list runs failed: no match; ")


@pytest.mark.usefixtures("offline")
def test_pretrained_backbones_are_those_in_a_package_or_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--timm--resnet50.a1_in1k" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    broken = tmp_path / "models--timm--resnet18.a1_in1k" / "snapshots" / "0"
    broken.mkdir(parents=True)
    (broken / "model.safetensors").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    rows = {row["name"]: row for row in json.loads(call("list", "backbones", "--pretrained", "--json").out)}
    assert rows["resnet50"]["weights"] == "auto" and str(tmp_path) in rows["resnet50"]["source"]
    assert "resnet18" not in rows
    assert refusal("list", "heads", "--pretrained").startswith("list heads --pretrained: only backbones have")
