"""The line that a study prints while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.runs.state import RunState
from harness.runs.store import RunStore
from studies import progress
from studies.plan import make_plan
from studies.progress import LiveTable
from studies.study import load_study
from tests.support.studies_at_hand import write_study


def test_time_left_counts_the_part_of_a_running_cell_that_is_done(
    tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(tmp_path / "s.yaml", colours, methods=["linear", "spm"], seeds=2)
    store = RunStore(tmp_path / "runs")
    plan = make_plan(load_study(study), store, tmp_path)
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    table = LiveTable(plan, store, quiet=True)
    table._began = 0.0
    first, second = plan.cells[0], plan.cells[2]
    first.state, second.state = RunState.DONE, RunState.RUNNING
    clock[0] = 60.0
    assert table._summary() == "1 of 4 cells done, 3 left, 1 min 00 s so far, about 3 min 00 s left"
    assert second.spec is not None
    run = store.by_fingerprint(second.spec.fingerprint)
    run.begin(second.spec, 1)
    for step in (3, 6):  # of twelve
        run.append_curve({"step": step, "loss": 1.0, "lr": 1e-3, "miou_train": 0.5, "images_per_second": 1.0})
    clock[0] = 90.0
    assert table._summary() == "1 of 4 cells done, 3 left, 1 min 30 s so far, about 2 min 30 s left"
    plan.cells[3].state = RunState.RUNNING
    details = table._summary(details=True)
    assert details.startswith("1 of 4 cells done, 3 left, spm (seed 0) at 50%, spm (seed 1) at 0%, 1 min 30 s so far")
