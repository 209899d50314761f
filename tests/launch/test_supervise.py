"""One job, watched: whatever it does, its supervisor lives, its run folder says what happened, the next one runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.launch.choice import LauncherChoice
from harness.launch.job import JobResult
from harness.launch.local import LocalLauncher
from harness.launch.supervise import Stop, supervise
from harness.runs.store import RunStore
from tests.support.tiny_jobs import (
    SLOW,
    Cells,
    all_ends,
    as_one,
    executions,
    figures,
    folder,
    run_all,
    steps_done,
    wait_until,
)

EXPLOSIVE = {"freeze_statistics": True, "lr": 10, "head_lr_scale": 1000}
LIMIT = 4

# method -> the job's settings and circumstances, the outcome, the reason
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "raises": ({}, "failed", r"LookupError: no such thing"),
    "full": (
        {"settings": EXPLOSIVE},
        "diverged",
        r"the loss was not finite at step \d+; try a smaller learning rate.*",
    ),
    "asks_for_all_memory": ({}, "out_of_memory", r"out of memory after step \d+; give a budget with a larger .*"),
    "exits": ({}, "failed", r"the process ended with code 3, 3 times; .*/\.launch/.*\.txt has its last words"),
    "crashes": ({}, "failed", r"the process was ended by SIGSEGV, 3 times; .*"),
    "hangs": ({"seconds": LIMIT}, "failed", r"took longer than its limit of 4 s \(--time-limit\)"),
    "hangs_deaf": ({"seconds": LIMIT}, "failed", r"took longer than its limit of 4 s \(--time-limit\)"),
}


@pytest.fixture(scope="module")
def ended(cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobResult]:
    """Each of the bad cells in a job of its own on one launcher, and after them a good one; by method."""
    runs = tmp_path_factory.mktemp("bad")
    jobs = [cells.job(runs, method, **given) for method, (given, _, _) in BAD.items()]
    jobs.append(cells.job(runs, "linear"))
    with LauncherChoice("local", min(2, len(os.sched_getaffinity(0))), "cpu").open() as launcher:
        found = run_all(launcher, jobs)
        assert launcher.free == launcher.slots
    return {job.request.method: found[job.fingerprint] for job in jobs}


@pytest.mark.parametrize("method", BAD)
def test_what_a_bad_job_does_is_an_outcome_and_a_reason_in_its_folder(ended: dict[str, JobResult], method: str) -> None:
    _, outcome, reason = BAD[method]
    one = ended[method]
    assert one.outcome == outcome and re.fullmatch(reason, str(one.reason)), one
    run = folder(one.job)
    status = run.status()
    assert status is not None and (status.state, status.reason) == (outcome, one.reason)
    assert run.result() is None
    assert RunStore(one.job.runs).lock_owner(run) is None


def test_a_good_job_after_bad_ones_is_done(ended: dict[str, JobResult]) -> None:
    assert ended["linear"].outcome == "done"
    assert executions(ended["linear"].job) == (1, 0)


def test_a_job_whose_process_ends_without_a_word_is_begun_three_times_and_leaves_its_last_words(
    ended: dict[str, JobResult],
) -> None:
    assert executions(ended["exits"].job) == (3, 0)
    assert executions(ended["raises"].job) == (1, 0)
    last_words = re.search(r"(/.*\.txt) has its last words", str(ended["crashes"].reason))
    assert last_words and "Segmentation fault" in Path(last_words[1]).read_text()


@pytest.fixture(scope="module")
def ended_together(cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, JobResult]]:
    """Good cells in one process with bad ones: such as end by themselves, and such as take it along; by method."""
    runs = tmp_path_factory.mktemp("together")
    groups = ["spm", "raises", "full", "asks_for_all_memory", "linear"], ["full", "is_killed", "spm"]
    jobs = [
        as_one(*(cells.job(runs, method, seed, **BAD.get(method, ({},))[0]) for method in methods))
        for seed, methods in enumerate(groups)
    ]
    with LauncherChoice("local", min(2, len(os.sched_getaffinity(0))), "cpu").open() as launcher:
        found = run_all(launcher, jobs)
        assert launcher.free == launcher.slots
    return [{cell.request.method: found[cell.fingerprint] for cell in job.members} for job in jobs]


def test_cells_of_one_process_end_as_they_do_alone(
    ended_together: list[dict[str, JobResult]], ended: dict[str, JobResult], undisturbed: dict[str, dict]
) -> None:
    quiet, loud = ended_together
    assert figures(quiet["linear"].job) == figures(ended["linear"].job)
    for spm in (quiet["spm"], loud["spm"]):
        assert spm.outcome == "done" and figures(spm.job) == undisturbed[spm.job.fingerprint]
    reasons = {method: (outcome, reason) for method, (_, outcome, reason) in BAD.items()}
    reasons["is_killed"] = (
        "failed", r"the process was ended by SIGKILL; the machine's memory may have run out, 3 times; .*",
    )  # fmt: skip
    for method, one in [*quiet.items(), *loud.items()]:
        if method in reasons:
            outcome, reason = reasons[method]
            status = folder(one.job).status()
            assert one.outcome == outcome and re.fullmatch(reason, str(one.reason)), one
            assert status is not None and (status.state, status.reason) == (outcome, one.reason)


def test_cells_share_a_process_until_it_dies_twice_and_what_ended_before_is_not_begun_again(
    ended_together: list[dict[str, JobResult]],
) -> None:
    quiet, loud = ended_together
    assert len({folder(quiet[method].job).status().pid for method in ("spm", "linear", "raises")}) == 1
    assert {method: executions(one.job) for method, one in quiet.items()} == {
        "spm": (1, 0), "linear": (1, 0), "raises": (1, 0), "full": (1, 0), "asks_for_all_memory": (2, 0),
    }  # fmt: skip
    assert {method: executions(one.job) for method, one in loud.items()} == {
        "full": (1, 0), "is_killed": (3, 0), "spm": (3, 0),
    }  # fmt: skip


def test_cells_of_one_process_are_stopped_together_and_after_a_kill_go_on_together(
    longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    slow, quick, claimed = (longer_cells.job(tmp_path, method) for method in (SLOW, "linear", "spm"))
    job = replace(as_one(slow, quick, claimed), checkpoint_seconds=0)
    with LocalLauncher(1, "cpu", {}) as launcher, RunStore(tmp_path).lock(folder(claimed)):
        launcher.submit(job)
        wait_until(lambda: steps_done(slow) > 3)
        launcher.stop(quick.fingerprint)
        ended = all_ends(launcher, 3)
        assert [ended[one.fingerprint].outcome for one in (slow, quick, claimed)] == ["interrupted"] * 2 + ["claimed"]
        for one in (slow, quick):
            status = folder(one).status()
            assert status is not None and ended[one.fingerprint].reason == status.reason
            assert status.reason == f"stopped after step {status.step}"
            assert any(folder(one).checkpoints.folder.glob(f"{status.step:09d}-*.pt"))
        launcher.submit(job)
        seen = steps_done(slow)
        wait_until(lambda: steps_done(slow) > seen + 3)
        os.kill(folder(slow).status().pid, signal.SIGKILL)
        ended = all_ends(launcher, 3)
    assert [ended[one.fingerprint].outcome for one in (slow, quick, claimed)] == ["done"] * 2 + ["claimed"]
    assert str(ended[claimed.fingerprint].reason).startswith(f"process {os.getpid()} on ")
    assert not folder(claimed).path.exists()
    assert [executions(one) for one in (slow, quick)] == [(3, 2)] * 2
    assert figures(slow) == undisturbed[slow.fingerprint]


def test_a_job_that_was_stopped_before_it_began_is_not_begun(cells: Cells, tmp_path: Path) -> None:
    job = cells.job(tmp_path)
    stop = Stop()
    stop()
    assert [one.outcome for one in supervise(job, stop)] == ["interrupted"]
    assert not folder(job).path.exists()


def test_a_job_that_another_process_executes_is_left_alone(cells: Cells, tmp_path: Path) -> None:
    job = cells.job(tmp_path)
    with RunStore(tmp_path).lock(folder(job)):
        (one,) = supervise(job)
    assert one.outcome == "claimed" and str(one.reason).startswith(f"process {os.getpid()} on ")
    assert not folder(job).path.exists()


@pytest.mark.parametrize(
    "left", [0, pytest.param(40_000, marks=pytest.mark.exhaustive)], ids=["for nothing", "for no checkpoint"]
)
def test_a_full_disk_is_a_reason_and_with_room_made_the_job_is_done(
    cells: Cells, undisturbed: dict[str, dict], small_disk: Path, left: int
) -> None:
    job = cells.job(small_disk / "runs")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
    (one,) = supervise(job)
    assert one.outcome == "failed" and "No space left on device" in str(one.reason), one
    filler.unlink()
    assert [one.outcome for one in supervise(job)] == ["done"]
    assert figures(job) == undisturbed[job.fingerprint]
