"""After any failure of a job the supervisor survives, the run folder records the outcome, and the next job runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from harness.launch.choice import LauncherChoice
from harness.launch.job import Job
from harness.launch.local import LocalLauncher
from harness.launch.supervise import Stop, supervise
from harness.runs.state import Outcome
from harness.runs.store import RunStore
from tests.support import step_costs
from tests.support.tiny_cell import environment
from tests.support.tiny_jobs import (
    SLOW,
    Cells,
    all_ends,
    as_one,
    executions,
    folder,
    results_of,
    run_all,
    state,
    steps_done,
    wait_until,
)

EXPLOSIVE = {"statistics": "frozen", "lr": 10, "head_lr": 10}
LIMIT = 0.1
"""Minutes."""

# method -> the job's settings and options, the state, the reason
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "raises": ({}, "failed", r"LookupError: no such thing"),
    "full": (
        {"settings": EXPLOSIVE, "head": "linear"},
        "diverged",
        r"the loss was not finite at step \d+; try smaller learning rates.*",
    ),
    "asks_for_all_memory": ({}, "out_of_memory", r"out of memory after step \d+; use a budget with a larger .*"),
    "exits": (
        {},
        "failed",
        r"the process ended with code 3, 3 times; the same command tries again; its last output is in .*/.launch/.*",
    ),
    "crashes": ({}, "failed", r"the process was ended by SIGSEGV, 3 times; .*"),
    "hangs": ({"time_limit": LIMIT}, "timed_out", r"took longer than its time limit of 0\.1 min \(--time-limit\)"),
    "hangs_deaf": ({"time_limit": LIMIT}, "timed_out", r"took longer than its time limit of 0\.1 min \(--time-limit\)"),
}


@dataclass(frozen=True)
class EndedJob:
    """A job of one cell, and how that ended."""

    job: Job
    outcome: Outcome

    def assert_recorded(self, state: str, reason: str) -> None:
        assert self.outcome.state == state and re.fullmatch(reason, str(self.outcome.reason)), self.outcome
        status = folder(self.job).status()
        assert status is not None and (status.state, status.reason) == (state, self.outcome.reason)


def execute_all(jobs: list[Job]) -> dict[str, EndedJob]:
    """On one local launcher; by method."""
    with LauncherChoice("local", min(2, len(os.sched_getaffinity(0))), "cpu").open() as launcher:
        results = run_all(launcher, jobs)
        assert launcher.free == launcher.slots
    step_costs.keep(jobs[0].options.runs)
    return {
        cell.request.method: EndedJob(replace(job, cells=(cell,)), results[cell.fingerprint].outcome)
        for job in jobs
        for cell in job.cells
    }


@pytest.fixture(scope="module")
def alone(cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EndedJob]:
    """Each of the bad cells in a job of its own on one launcher, and after them a good one; by method."""
    runs = tmp_path_factory.mktemp("bad")
    jobs = [cells.job(runs, method, **fields) for method, (fields, _, _) in BAD.items()]
    return execute_all([*jobs, cells.job(runs, "linear")])


@pytest.mark.parametrize("method", BAD)
def test_bad_cell_is_recorded_with_a_reason_and_unlocked(alone: dict[str, EndedJob], method: str) -> None:
    _, state, reason = BAD[method]
    alone[method].assert_recorded(state, reason)
    run = folder(alone[method].job)
    assert not run.result_path.exists()
    assert RunStore(run.path.parent).lock_owner(run) is None


def test_good_cell_after_bad_ones_is_done(alone: dict[str, EndedJob]) -> None:
    assert alone["linear"].outcome.state == "done"
    assert executions(alone["linear"].job) == (1, 0)


def test_dying_cell_is_tried_three_times_and_its_output_is_kept(alone: dict[str, EndedJob]) -> None:
    assert executions(alone["exits"].job) == (3, 0)
    assert executions(alone["raises"].job) == (1, 0)
    output = re.search(r"(/.*\.txt)$", str(alone["crashes"].outcome.reason))
    assert output and "Segmentation fault" in Path(output[1]).read_text()


@pytest.fixture(scope="module")
def side_by_side(
    cells: Cells, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, EndedJob], dict[str, EndedJob]]:
    """Good cells in one process with bad ones: first ones that end by themselves, then ones that kill it; by method."""
    runs = tmp_path_factory.mktemp("together")
    groups = ["spm", "raises", "full", "asks_for_all_memory", "linear"], ["full", "is_killed", "spm"]
    jobs = [
        as_one(*(cells.job(runs, method, seed, **BAD.get(method, ({},))[0]) for method in methods))
        for seed, methods in enumerate(groups)
    ]
    surviving, dying = (execute_all([job]) for job in jobs)
    return surviving, dying


def test_cells_of_one_process_end_as_they_do_alone(
    side_by_side: tuple[dict[str, EndedJob], dict[str, EndedJob]],
    alone: dict[str, EndedJob],
    undisturbed: dict[str, dict],
) -> None:
    surviving, dying = side_by_side
    assert results_of(surviving["linear"].job) == results_of(alone["linear"].job)
    for spm in (surviving["spm"], dying["spm"]):
        assert spm.outcome.state == "done" and results_of(spm.job) == undisturbed[spm.job.name]
    for method, one in [*surviving.items(), *dying.items()]:
        if method in BAD:
            one.assert_recorded(*BAD[method][1:])
    dying["is_killed"].assert_recorded(
        "failed", r"the process was ended by SIGKILL; the machine's memory may have run out, 3 times; .*"
    )


def test_cells_share_a_process_until_it_died_twice(
    side_by_side: tuple[dict[str, EndedJob], dict[str, EndedJob]],
) -> None:
    surviving, dying = side_by_side
    assert len({folder(surviving[method].job).status().pid for method in ("spm", "linear", "raises")}) == 1
    assert {method: executions(one.job) for method, one in surviving.items()} == {
        "spm": (1, 0), "linear": (1, 0), "raises": (1, 0), "full": (1, 0), "asks_for_all_memory": (2, 0),
    }  # fmt: skip
    assert {method: executions(one.job) for method, one in dying.items()} == {
        "full": (1, 0), "is_killed": (3, 0), "spm": (3, 0),
    }  # fmt: skip


def test_job_that_cannot_be_started_is_recorded_and_a_finished_run_stays_done(
    cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = cells.job(tmp_path, "linear")
    assert execute_all([finished])["linear"].outcome.state == "done"

    def no_process(*_: object) -> None:
        raise OSError(11, "no more processes")

    monkeypatch.setattr("harness.launch.local.supervise", no_process)
    ended = execute_all([finished, cells.job(tmp_path, "spm")])
    assert ended["linear"].outcome.state == "done"
    ended["spm"].assert_recorded("failed", r"BlockingIOError: .*no more processes")

    monkeypatch.setattr("harness.runs.locks.RunLock.__init__", no_process)  # its thread cannot be started either
    ended = execute_all([finished, cells.job(tmp_path, "spm", seed=1)])
    assert ended["linear"].outcome.state == "done"
    assert ended["spm"].outcome.state == "failed" and "no more processes" in str(ended["spm"].outcome.reason)


def test_cells_of_one_process_stop_and_resume_together(
    longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    slow, quick, locked = (longer_cells.job(tmp_path, method) for method in (SLOW, "linear", "spm"))
    job = as_one(slow, quick, locked)
    job = replace(job, options=replace(job.options, checkpoint_seconds=0))
    with LocalLauncher(1, "cpu", {}) as launcher, RunStore(tmp_path).lock(folder(locked)):
        launcher.submit(job)
        wait_until(lambda: steps_done(slow) > 3)
        launcher.stop(quick.name)
        results = all_ends(launcher, 3)
        assert [state(results[one.name]) for one in (slow, quick, locked)] == ["interrupted"] * 2 + ["running"]
        for one in (slow, quick):
            status = folder(one).status()
            assert status is not None and results[one.name].outcome.reason == status.reason
            assert status.reason == f"stopped after step {status.step}"
            assert any(folder(one).checkpoints.folder.glob(f"{status.step:09d}-*.pt"))
        launcher.submit(job)
        seen = steps_done(slow)
        wait_until(lambda: steps_done(slow) > seen + 3)
        os.kill(folder(slow).status().pid, signal.SIGKILL)
        results = all_ends(launcher, 3)
    assert [state(results[one.name]) for one in (slow, quick, locked)] == ["done"] * 2 + ["running"]
    assert str(results[locked.name].outcome.reason).startswith(f"process {os.getpid()} on ")
    assert not folder(locked).path.exists()
    assert [executions(one) for one in (slow, quick)] == [(3, 2)] * 2
    assert results_of(slow) == undisturbed[slow.name]


def test_job_that_is_stopped_before_it_starts_leaves_nothing(cells: Cells, tmp_path: Path) -> None:
    job = cells.job(tmp_path)
    stop = Stop()
    stop()
    assert [state(result) for result in supervise(job, stop)] == ["interrupted"]
    assert not folder(job).path.exists()


def test_locked_run_is_left_alone(cells: Cells, tmp_path: Path) -> None:
    job = cells.job(tmp_path)
    with RunStore(tmp_path).lock(folder(job)):
        (result,) = supervise(job)
    assert result.outcome.state == "running" and str(result.outcome.reason).startswith(f"process {os.getpid()} on ")
    assert not folder(job).path.exists()


@pytest.mark.parametrize(
    "left", [0, pytest.param(40_000, marks=pytest.mark.exhaustive)], ids=["for nothing", "for no checkpoint"]
)
def test_full_disk_fails_the_job_and_with_space_it_is_done(
    cells: Cells, undisturbed: dict[str, dict], small_disk: Path, left: int
) -> None:
    job = cells.job(small_disk / "runs")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
    (result,) = supervise(job)
    assert result.outcome.state == "failed" and "No space left on device" in str(result.outcome.reason), result
    filler.unlink()
    assert [state(result) for result in supervise(job)] == ["done"]
    assert results_of(job) == undisturbed[job.name]


def test_preload_does_not_ask_for_a_gpu() -> None:
    """After that, no process that is forked from it could use one."""
    code = """
import torch
def ask():
    raise SystemExit("asked for a GPU")
torch._C._cuda_getDeviceCount = ask
import harness.launch.preload
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
