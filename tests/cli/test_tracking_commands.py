"""`harness sync` and `harness ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.tracking.mirror import Summary
from tests.support.in_process import call, refusal


def test_sync_counts_runs_and_names_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = Summary(mirrored=2, current=1, failed={"ab12": "its status.json is damaged"})
    monkeypatch.setattr("harness.tracking.mirror.sync", lambda runs, uri: summary)
    output = call("sync", "--runs", tmp_path)
    assert output.code == 1
    assert output.out == "2 mirrored, 1 up to date, 1 failed\n  ab12: its status.json is damaged\n"
    monkeypatch.setattr("harness.tracking.mirror.sync", lambda runs, uri: Summary())
    assert call("sync", "--runs", tmp_path).code == 0


def test_ui_passes_arguments_and_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[Any, ...]] = []
    monkeypatch.setattr("harness.tracking.mirror.ui", lambda *arguments: served.append(arguments) or 3)
    assert call("ui", "--runs", tmp_path, "--port", "5001").code == 3
    assert served == [(tmp_path, None, "127.0.0.1", 5001)]


@pytest.mark.parametrize("command", ["ui", "sync"])
def test_tracking_off_is_refused(command: str, tmp_path: Path) -> None:
    assert refusal(command, "--runs", tmp_path, "--tracking", "off").startswith("--tracking off: no store to ")
