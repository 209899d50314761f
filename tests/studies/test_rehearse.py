"""`compare --rehearse` executes a few steps of every distinct cell and keeps nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.engine.training import TrainState
from tests.support.in_process import call
from tests.support.studies_at_hand import write_study


def test_every_distinct_cell_is_rehearsed_once(tmp_path: Path, colours: Path) -> None:
    tune = {"head": {"trials": 2, "space": "0.001|0.01"}, "trials": 3, "parameters": ["hidden"],
            "space": {"hidden": "8|12|16"}}  # fmt: skip
    study = write_study(tmp_path / "s.yaml", colours, methods=["linear", "spm"], seeds=2, tune=tune)
    arguments = ["compare", study, "--rehearse", "--runs", tmp_path / "runs", "--data", tmp_path, "--device", "cpu"]
    found = call(*arguments, "--tracking", "off", "--json")
    assert found.code == 0, found.err
    head, linear, spm = json.loads(found.out)
    assert [row["runs"] for row in (head, linear, spm)] == [2, 2, 2 + 3]
    assert spm["settings"] == {"hidden": 16}  # the largest that is searched
    for row in (head, linear, spm):
        assert row["reason"] is None
        assert row["peak_bytes"] > 0 and 0 < row["step_seconds"] < row["run_seconds"]
    assert spm["peak_bytes"] > linear["peak_bytes"] and spm["delta_bytes"] > linear["delta_bytes"] > 0
    assert not list((tmp_path / "runs").glob("????????????????"))


def test_step_is_timed_with_the_threads_of_one_job(
    tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    learn = TrainState.learn

    def learn_on_one_thread(*given: Any) -> Any:  # two threads wait for each other actively where a core is busy
        seen.append(threads := torch.get_num_threads())
        torch.set_num_threads(1)
        try:
            return learn(*given)
        finally:
            torch.set_num_threads(threads)

    monkeypatch.setattr(TrainState, "learn", learn_on_one_thread)
    study = write_study(tmp_path / "s.yaml", colours, methods=["linear"], seeds=1)
    common = ["--rehearse", "--runs", tmp_path / "runs", "--data", tmp_path, "--device", "cpu", "--tracking", "off"]
    torch.set_num_threads(2)
    try:
        assert call("compare", study, *common, "--jobs", 2).code == 0
        assert set(seen) == {1} and torch.get_num_threads() == 2
        seen.clear()
        assert call("compare", study, *common).code == 0
        assert set(seen) == {2}
    finally:
        torch.set_num_threads(1)


def test_cell_that_fails_is_named_and_the_others_are_rehearsed(tmp_path: Path, colours: Path) -> None:
    study = write_study(tmp_path / "s.yaml", colours, methods=["linear"], heads=["setr_pup", "fpn:16"], seeds=1)
    arguments = ["compare", study, "--rehearse", "--runs", tmp_path / "runs", "--data", tmp_path, "--device", "cpu"]
    found = call(*arguments, "--tracking", "off")
    assert found.code == 1
    failed, works = found.out.splitlines()[1:3]
    assert "is for a ViT of one resolution" in failed and works.endswith("works")
    assert found.out.splitlines()[3].endswith("without the 1 run of cells that fail")
