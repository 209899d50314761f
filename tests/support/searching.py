"""Searches whose trials cost nothing: their runs are locked and written like any other, but nothing is trained."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from harness.cells.resolve import Request, Resolver
from harness.runs.folder import RunFolder
from harness.runs.locks import AlreadyLocked
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from studies.search.search import Search, TrialJob
from studies.search.spec import Range, Trial
from tests.support.results import finish, make_result

STEPS = 12  # of the tiny budget
SPACE = {
    "lr": Range(low=1e-4, high=1e-2, log=True),
    "hidden": Range(low=8, high=64, integer=True),
    "kernel": Range(choices=(3, 5, 7)),
}
GRID = {"hidden": Range(low=4, high=8, integer=True), "kernel": Range(choices=(3, 5))}


@dataclass(frozen=True)
class Place:
    """A run store with searches of one tiny cell. Plain values: it is passed to other processes."""

    root: Path
    dataset: Path
    budget: Path
    storage: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def store(self) -> RunStore:
        return RunStore(self.root)

    @property
    def executed(self) -> list[str]:
        """The fingerprints of all runs that were executed, one for each time."""
        log = self.root / "executed.txt"
        return log.read_text().split() if log.exists() else []

    @property
    def request(self) -> Request:
        dataset, budget = str(self.dataset), str(self.budget)
        return Request("spm", "test_resnet", "random", dataset, "fpn:16", budget, part="dev")

    def open(self, trials: int, space: dict[str, Range] = SPACE, **options: Any) -> Search:
        options = {"storage": self.storage, "warn": self.warnings.append, **options}
        return Search(self.request, space, trials, self.store, _resolver(self.root), **options)

    def run(self, fingerprint: str) -> RunFolder:
        return RunFolder(self.root / fingerprint)


@functools.cache
def _resolver(root: Path) -> Resolver:
    return Resolver(RunStore(root), root)


def quality(job: TrialJob) -> float:
    """The mIoU of a run: the best learning rate is 1e-3; a wide matcher and a high seed are a little better."""
    lr, hidden = job.request.settings.get("lr", 1e-3), job.request.settings["hidden"]
    return 0.6 - 0.1 * abs(math.log10(lr) + 3) + 0.001 * hidden + 0.01 * job.request.seed


def execute_trial(place: Place, job: TrialJob, **values: float | None) -> None:
    """Write the run of a trial as a finished one; `values` replace its own. Raises `AlreadyLocked`."""
    run = place.run(job.fingerprint)
    with place.store.lock(run) as run.lock:
        if run.result_path.exists():
            return
        run.begin(_resolver(place.root)(job.request).spec, attempt=1)
        for step in range(1, STEPS + 1):
            run.append_curve({"step": step, "miou_train": quality(job) * step / STEPS})
        with (place.root / "executed.txt").open("a") as log:
            log.write(f"{job.fingerprint}\n")
        spec = _resolver(place.root)(job.request).spec
        metrics = {"miou": values.pop("miou", quality(job))}
        finish(
            run,
            make_result(
                spec, metrics=metrics, parameters={"trainable": 100 * job.request.settings["hidden"]}, **values
            ),
        )


def drive(place: Place, search: Search, seconds: float = 0.0) -> list[Trial]:
    """Execute a search, one trial at a time, each for at least `seconds`, until all have ended."""
    while not search.finished:
        job = search.next()
        if job is None:
            time.sleep(0.1)
            search.poll()
            continue
        try:
            time.sleep(seconds)
            execute_trial(place, job)
        except AlreadyLocked as error:
            search.ended(job.fingerprint, Outcome(RunState.RUNNING, error.lock_owner))
        else:
            search.ended(job.fingerprint, Outcome(RunState.DONE))
    return search.trials


def work(place: Place, trials: int, seconds: float, options: dict[str, Any]) -> None:
    """Body of a worker process."""
    with place.open(trials, **options) as search:
        drive(place, search, seconds)


def work_until_killed(place: Place, trials: int, calls: int, options: dict[str, Any]) -> None:
    """`work`, with a `kill -9` of the process at the given call of a function of the harness or of Optuna."""
    left = calls

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event == "call" and _is_watched(frame.f_code.co_filename):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    work(place, trials, 0.0, options)


@functools.cache
def _is_watched(file: str) -> bool:
    return any(part in file for part in ("/studies/", "/harness/", "/optuna/st", "/sqlalchemy/orm/session"))


def start(target: Callable[..., None], place: Place, *arguments: Any) -> BaseProcess:
    """A forked process; what is slow to import or to look up was imported and looked up before."""
    _resolver(place.root)(place.request)
    process = multiprocessing.get_context("fork").Process(target=target, args=(place, *arguments))
    process.start()
    return process
