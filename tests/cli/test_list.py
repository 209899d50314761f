"""`harness list`: every list as a table and as JSON, patterns, details, weights at hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.in_process import call

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
