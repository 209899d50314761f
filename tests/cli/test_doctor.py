"""`harness doctor`: what is installed and what to do about the rest."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from harness.cli.doctor import examine, print_findings
from tests.support.in_process import call, refusal


@pytest.mark.usefixtures("offline")
def test_doctor_reports_what_is_present_and_how_to_get_the_rest(tmp_path: Path) -> None:
    output = call("doctor", "--json", "--runs", tmp_path / "runs", "--data", tmp_path)
    findings = {finding["what"]: finding for finding in json.loads(output.out)}
    assert (output.code, output.err) == (0, "")
    assert findings["package torch"]["state"] == "ok"
    assert findings["dataset ade20k"]["state"] == "absent"
    assert "`harness run --dataset ade20k`" in findings["dataset ade20k"]["remedy"]
    assert findings["weights hub"]["state"] == "absent"
    assert {finding["state"] for finding in findings.values()} <= {"ok", "absent"}
    table = call("doctor", "--runs", tmp_path / "runs", "--data", tmp_path)
    assert table.code == 0
    assert all(what in table.out for what in findings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("offline")
def test_broken_plugin_is_named_and_others_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "no_such_package:Theirs", "harness.methods")
    monkeypatch.setattr("harness.util.registry.entry_points", lambda group: [point])
    output = call("doctor", "--runs", tmp_path, "--data", tmp_path)
    assert output.code == 1
    assert re.search(r"method theirs +broken +.*No module named 'no_such_package'", output.out)
    listed = next(line for line in call("list", "methods").out.splitlines() if line.startswith("theirs "))
    assert "broken: " in listed and "no_such_package:Theirs failed to import" in listed
    assert refusal("run", "--method", "theirs").startswith("--method theirs: no_such_package:Theirs failed to import")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("columns", [80, 100])
def test_table_is_as_wide_as_the_terminal_and_loses_nothing(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    findings = examine(Path("runs"), tmp_path / "a folder of data sets" / ("long" * 30))
    print_findings(findings)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    lines = [line for line in lines if not line.startswith("weights")]  # one of these names takes two lines
    shown = "".join("".join(lines).split())
    for finding in findings:
        if not finding["what"].startswith("weights"):
            assert "".join("".join(finding.values()).split()) in shown
