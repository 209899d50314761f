"""Jobs through submitit, with local processes instead of Slurm: the same files, signals and results."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.errors import UserError
from harness.launch.choice import LauncherChoice
from harness.launch.slurm import SlurmLauncher
from harness.launch.supervise import supervise
from harness.runs.folder import RunFolder
from tests.support.tiny_jobs import (
    SLOW,
    Cells,
    all_ends,
    as_one,
    executions,
    folder,
    only_end,
    results_of,
    state,
    steps_done,
    wait_until,
)

pytest.importorskip("submitit")


@pytest.fixture
def launcher() -> Iterator[SlurmLauncher]:
    with LauncherChoice("slurm", device="cpu", settings={"cluster": "local"}).open() as launcher:
        assert isinstance(launcher, SlurmLauncher)
        yield launcher


def options(**settings: str) -> dict[str, Any]:
    return SlurmLauncher.read_options(settings)


def body() -> psutil.Process:
    """The process that Slurm would start on a node."""

    def found() -> list[psutil.Process]:
        below = psutil.Process().children(recursive=True)
        return [process for process in below if "submitit.core._submit" in process.cmdline()]

    wait_until(found)
    (process,) = found()
    return process


def test_error_without_slurm_or_submitit_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="`sbatch` is not on PATH; run the command on a login node"):
        SlurmLauncher(None, "auto", options())
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"submitit is not installed; pip install \"segmentation-tuning-harness\[slurm"):
        SlurmLauncher(None, "auto", options())


@pytest.mark.parametrize("setting", ["cpus=0", "gpus=-1", "mem_gb=-2.0", "minutes=0", "requeues=-1"])
def test_option_out_of_range_is_named(setting: str) -> None:
    name, _, value = setting.partition("=")
    with pytest.raises(UserError, match=f"--launcher-set {setting}: use a number of at least"):
        SlurmLauncher(None, "auto", options(**{name: value}))


def test_unknown_cluster_is_refused() -> None:
    with pytest.raises(UserError, match="--launcher-set cluster=debug: use slurm or local"):
        SlurmLauncher(None, "auto", options(cluster="debug"))


@pytest.mark.exhaustive
def test_job_gives_the_results_of_the_local_launcher(
    launcher: SlurmLauncher, cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    job, second = (cells.job(tmp_path, method, threads=None) for method in ("spm", "linear"))
    assert launcher.slots == launcher.free == 1
    launcher.submit(as_one(job, second))
    assert launcher.free == 0
    assert [(result.cell, state(result)) for result in all_ends(launcher, 2).values()] == [
        (cell, "done") for cell in (*job.cells, *second.cells)
    ]
    assert launcher.free == 1
    assert executions(job) == executions(second) == (1, 0)
    assert results_of(job) == undisturbed[job.name]


def test_job_at_its_time_limit_is_requeued(
    launcher: SlurmLauncher, longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    job = longer_cells.job(tmp_path, SLOW)
    launcher.submit(job)
    wait_until(lambda: steps_done(job) > 3)
    first = body()
    first.send_signal(signal.SIGUSR2)
    first.wait(timeout=900)
    assert launcher.wait(0) == []
    seen = steps_done(job)
    wait_until(lambda: steps_done(job) > seen)
    assert executions(job) == (2, 1)
    launcher.stop(job.name)
    assert state(only_end(launcher)) == "interrupted"
    status = folder(job).status()
    assert status is not None and status.reason == f"stopped after step {status.step}"
    assert [state(result) for result in supervise(job)] == ["done"]
    assert executions(job) == (3, 2)
    assert results_of(job) == undisturbed[job.name]


def test_job_that_dies_is_interrupted_with_a_reason(launcher: SlurmLauncher, cells: Cells, tmp_path: Path) -> None:
    job = as_one(cells.job(tmp_path), cells.job(tmp_path, "linear"))
    launcher.submit(job)
    body().kill()
    ended = all_ends(launcher, 2)
    for cell in job.cells:
        outcome, status = ended[cell.fingerprint].outcome, RunFolder(tmp_path / cell.fingerprint).status()
        assert outcome.state == "interrupted" and status is not None
        assert (status.state, status.reason) == ("interrupted", outcome.reason)
        reason = str(outcome.reason)
        assert reason.startswith("Slurm job ") and "ended without a result: FINISHED; see " in reason
