"""One job, watched: whatever it does, its supervisor lives, its run folder says what happened, the next one runs."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_jobs import (
    SLOW,
    Cells,
    executions,
    figures,
    folder,
    only_end,
    run_all,
    start_launcher,
    steps_done,
    wait_until,
)

from harness.launch import Ended, LauncherChoice
from harness.launch.local import LocalLauncher
from harness.launch.supervise import Stop, supervise
from harness.runs import RunStore

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
    "is_killed": (
        {},
        "failed",
        r"the process was ended by SIGKILL; the machine's memory may have run out, 3 times; .*",
    ),
    "crashes": ({}, "failed", r"the process was ended by SIGSEGV, 3 times; .*"),
    "hangs": ({"seconds": LIMIT}, "failed", r"took longer than its limit of 4 s \(--time-limit\)"),
    "hangs_deaf": ({"seconds": LIMIT}, "failed", r"took longer than its limit of 4 s \(--time-limit\)"),
}


@pytest.fixture(scope="module")
def ended(cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All the bad jobs on one launcher, and after them a good one; by method."""
    runs = tmp_path_factory.mktemp("bad")
    jobs = [cells.job(runs, method, **given) for method, (given, _, _) in BAD.items()]
    jobs.append(cells.job(runs, "linear"))
    with LauncherChoice("local", min(2, len(os.sched_getaffinity(0))), "cpu").open() as launcher:
        found = run_all(launcher, jobs)
        assert launcher.free == launcher.slots
    return {job.request.method: found[job.fingerprint] for job in jobs}


@pytest.mark.parametrize("method", BAD)
def test_what_a_bad_job_does_is_an_outcome_and_a_reason_in_its_folder(ended: dict[str, Ended], method: str) -> None:
    _, outcome, reason = BAD[method]
    one = ended[method]
    assert one.outcome == outcome and re.fullmatch(reason, str(one.reason)), one
    run = folder(one.job)
    status = run.status()
    assert status is not None and (status.state, status.reason) == (outcome, one.reason)
    assert run.result() is None
    assert RunStore(one.job.runs).holder(run) is None


def test_a_good_job_after_bad_ones_is_done(ended: dict[str, Ended]) -> None:
    assert ended["linear"].outcome == "done"
    assert executions(ended["linear"].job) == (1, 0)


def test_a_job_whose_process_ends_without_a_word_is_begun_three_times_and_leaves_its_last_words(
    ended: dict[str, Ended],
) -> None:
    assert executions(ended["exits"].job) == (3, 0)
    assert executions(ended["raises"].job) == (1, 0)
    last_words = re.search(r"(/.*\.txt) has its last words", str(ended["crashes"].reason))
    assert last_words and "Segmentation fault" in Path(last_words[1]).read_text()


def test_killed_once_it_goes_on_from_its_checkpoint_and_ends_as_undisturbed(
    longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    job = longer_cells.job(tmp_path, SLOW, checkpoint_seconds=0)
    answers: list[Ended] = []
    thread = threading.Thread(target=lambda: answers.append(supervise(job)))
    thread.start()
    wait_until(lambda: steps_done(job) > 3)
    os.kill(folder(job).status().pid, signal.SIGKILL)
    thread.join()
    assert [answer.outcome for answer in answers] == ["done"]
    assert executions(job) == (2, 1)
    assert figures(job) == undisturbed[job.fingerprint]


def test_stopped_it_is_interrupted_with_a_checkpoint_and_the_next_attempt_ends_as_undisturbed(
    longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    job = longer_cells.job(tmp_path, SLOW)
    with LocalLauncher(1, "cpu", {}) as launcher:
        launcher.submit(job)
        wait_until(lambda: steps_done(job) > 3)
        launcher.stop(job.fingerprint)
        one = only_end(launcher)
        status = folder(job).status()
        assert one.outcome == "interrupted" and status is not None
        assert one.reason == status.reason == f"stopped after step {status.step}"
        assert any(folder(job).checkpoints.folder.glob(f"{status.step:09d}-*.pt"))
    assert supervise(job).outcome == "done"
    assert executions(job) == (2, 1)
    assert figures(job) == undisturbed[job.fingerprint]


def test_a_job_that_was_stopped_before_it_began_is_not_begun(cells: Cells, tmp_path: Path) -> None:
    job = cells.job(tmp_path)
    stop = Stop()
    stop()
    assert supervise(job, stop).outcome == "interrupted"
    assert not folder(job).path.exists()


def test_a_job_that_another_process_executes_is_left_alone(cells: Cells, tmp_path: Path) -> None:
    job = cells.job(tmp_path)
    with RunStore(tmp_path).claim(folder(job)):
        one = supervise(job)
    assert one.outcome == "claimed" and str(one.reason).startswith(f"process {os.getpid()} on ")
    assert not folder(job).path.exists()


LAUNCHER = """
import sys, pickle
from harness.launch.local import LocalLauncher
with LocalLauncher(1, "cpu", {}) as launcher:
    launcher.submit(pickle.loads(bytes.fromhex(sys.argv[1])))
    while not launcher.wait(1):
        pass
"""


def test_a_launcher_that_is_killed_takes_its_job_with_it_and_another_finishes_it(
    longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    job = longer_cells.job(tmp_path, SLOW)
    launcher = start_launcher(LAUNCHER, pickle.dumps(job))
    try:
        wait_until(lambda: steps_done(job) > 3)
        process = psutil.Process(folder(job).status().pid)
        server = process.parent()
    finally:
        launcher.kill()
        launcher.wait()
    psutil.wait_procs([process, server], timeout=60)
    assert not process.is_running() and not server.is_running()
    status = folder(job).status()
    assert status is not None and status.state == "interrupted"
    assert supervise(job).outcome == "done"
    assert executions(job) == (2, 1)
    assert figures(job) == undisturbed[job.fingerprint]


@pytest.mark.parametrize("left", [0, 40_000], ids=["for nothing", "for no checkpoint"])
def test_a_full_disk_is_a_reason_and_with_room_made_the_job_is_done(
    cells: Cells, undisturbed: dict[str, dict], small_disk: Path, left: int
) -> None:
    job = cells.job(small_disk / "runs")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
    one = supervise(job)
    assert one.outcome == "failed" and "No space left on device" in str(one.reason), one
    filler.unlink()
    assert supervise(job).outcome == "done"
    assert figures(job) == undisturbed[job.fingerprint]
