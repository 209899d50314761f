"""Executes a job in a process of its own: if that crashes, leaks, hangs or is killed, nothing else is affected.

Every launcher calls `supervise`: in a thread, in a Ray task or in a Slurm job. The code of the job's own process is in
`worker.py`.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from harness.cells.resolve import resolve
from harness.engine.options import ExecutionOptions
from harness.launch.job import Job, JobCell, JobResult
from harness.launch.worker import GRACE, output_file, run_job
from harness.runs.locks import AlreadyLocked
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.util.fork_server import fork_context

ATTEMPTS = 3
"""How often a cell is started if its process dies without a result (killed, crashed); it resumes from a checkpoint."""


class Stop:
    """Set it, from any thread, to make `supervise` stop its job."""

    def __init__(self) -> None:
        self._reader, self._writer = multiprocessing.Pipe(duplex=False)

    def __call__(self) -> None:
        if not self.requested:
            self._writer.send(None)

    @property
    def requested(self) -> bool:
        return self._reader.poll()

    @property
    def waitable(self) -> Connection:
        return self._reader


def supervise(job: Job, stop: Stop | None = None) -> list[JobResult]:
    """Execute the job's cells until all have ended, and make sure that their run folders record the outcome.

    Returns one `JobResult` per cell, in the job's order. A run that is done, or that another process executes, is not
    changed. Cells share a process unless that fails: a cell that may have failed because of the others (its process
    died, or memory or time ran out for all of them) is executed again alone.
    """
    stop = stop or Stop()
    results, deaths = _side_by_side(job, stop) if len(job.cells) > 1 else ({}, 0)
    for cell in job.cells:
        if cell.fingerprint not in results:
            results[cell.fingerprint] = _alone(replace(job, cells=(cell,)), stop, deaths)
    return [results[cell.fingerprint] for cell in job.cells]


def _alone(job: Job, stop: Stop, deaths: int) -> JobResult:
    """The result of a job of one cell. `deaths`: how many of its processes have died before."""
    (cell,) = job.cells
    options = job.options
    deadline = _deadline(job)
    for _ in range(deaths, ATTEMPTS):
        if stop.requested:
            break
        worker = _Worker(job)
        results = worker.watch(stop, deadline)
        if results and (results[0].outcome.state is RunState.DONE or not worker.timed_out):
            return results[0]
        if worker.timed_out:
            reason = f"took longer than its time limit of {options.time_limit:g} min (--time-limit)"
            return record(options, cell, Outcome(RunState.TIMED_OUT, reason))
    if stop.requested:
        return stopped(options, cell)
    cause = f"{_cause_of_death(worker.process.exitcode)}, {ATTEMPTS} times"
    reason = f"{cause}; the same command tries again; its last output is in {worker.output}"
    return record(options, cell, Outcome(RunState.FAILED, reason))


def _side_by_side(job: Job, stop: Stop) -> tuple[dict[str, JobResult], int]:
    """Results, by fingerprint, of the cells that do not have to run alone, and how often their process died.

    The last attempt is not made here: each cell makes it alone.
    """
    deadline = _deadline(job)
    results: dict[str, JobResult] = {}
    for deaths in range(ATTEMPTS - 1):
        left = tuple(cell for cell in job.cells if cell.fingerprint not in results)
        if not left or stop.requested:
            break
        worker = _Worker(replace(job, cells=left))
        sent = worker.watch(stop, deadline)
        found = sent if sent is not None else _results_in_folders(job.options, left, worker.process)
        results |= {one.cell.fingerprint: one for one in found if _holds_alone(one.outcome, worker, stop)}
        if sent is not None or worker.timed_out:
            return results, deaths
    return results, ATTEMPTS - 1


def _deadline(job: Job) -> float:
    limit = job.options.time_limit_seconds
    return math.inf if limit is None else time.monotonic() + limit * len(job.cells)


def _holds_alone(outcome: Outcome, worker: _Worker, stop: Stop) -> bool:
    """Whether the outcome would be the same if the cell ran alone, with all the memory and its own time limit."""
    if outcome.state is RunState.OUT_OF_MEMORY:
        return False
    return outcome.state is not RunState.INTERRUPTED or stop.requested or not worker.timed_out


def _results_in_folders(
    options: ExecutionOptions, cells: Sequence[JobCell], process: BaseProcess
) -> Iterator[JobResult]:
    """Results of cells that ended before their process died, which could no longer send them."""
    store = RunStore(options.runs)
    for cell in cells:
        run = store.by_fingerprint(cell.fingerprint)
        outcome, status = store.outcome(run), run.status()
        by_process = status is not None and status.pid == process.pid
        if outcome.state is RunState.DONE or (by_process and (outcome.state.final or outcome.state.failed)):
            yield JobResult(cell, outcome)


def stopped(options: ExecutionOptions, cell: JobCell) -> JobResult:
    """The result of a cell whose process was stopped and sent none."""
    store = RunStore(options.runs)
    run = store.by_fingerprint(cell.fingerprint)
    outcome, status = store.outcome(run), run.status()
    if outcome.state is RunState.DONE:
        return JobResult(cell, outcome)
    interrupted = Outcome(RunState.INTERRUPTED)
    if status is not None and status.state is RunState.RUNNING:  # killed before it could write its state
        return record(options, cell, replace(interrupted, reason="killed"))
    return JobResult(cell, interrupted)


def record(options: ExecutionOptions, cell: JobCell, outcome: Outcome) -> JobResult:
    """Write the outcome that the process could no longer write to the run folder. Raises nothing: it would be lost."""
    try:
        store = options.open_store()
        found = store.outcome(store.by_fingerprint(cell.fingerprint))
        if found.state is RunState.DONE:
            return JobResult(cell, found)
        return JobResult(cell, store.record(resolve(cell.request, store, options.data).spec, outcome))
    except AlreadyLocked as error:
        return JobResult(cell, Outcome(RunState.RUNNING, error.lock_owner))
    except Exception as error:  # for example, no thread can be started to renew the lock's lease
        return JobResult(cell, replace(outcome, reason=f"{outcome.reason} ({error})"))


def _cause_of_death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        cause = "; the machine's memory may have run out" if -code == signal.SIGKILL else ""
        return f"the process was ended by {name}{cause}"
    return f"the process ended with code {code}"


class _Worker:
    """A process that executes a job, the pipe for its results, and the pipe by which it sees this process die."""

    def __init__(self, job: Job):
        self.timed_out = False
        self._time_limit = job.options.time_limit_seconds
        context = fork_context("harness.launch.preload")  # that process never uses an accelerator itself
        self._results, send = context.Pipe(duplex=False)
        lifeline, self._lifeline = context.Pipe(duplex=False)
        self.process = context.Process(target=run_job, args=(job, send, lifeline), name=job.name)
        with _starting:
            self.process.start()
        send.close()
        lifeline.close()
        assert self.process.pid is not None
        self.output = output_file(job, self.process.pid)

    def watch(self, stop: Stop, deadline: float) -> list[JobResult] | None:
        """The results that the process sent, or None. Stops it when `stop` is set or the deadline has passed."""
        grace = min(GRACE, self._time_limit or GRACE)
        results: list[JobResult] | None = None
        sources: list[Any] = [self.process.sentinel, self._results, stop.waitable]
        kill_at = math.inf
        try:
            while self.process.is_alive():
                limit = min(deadline, kill_at)
                ready = connection.wait(sources, None if limit == math.inf else max(0.0, limit - time.monotonic()))
                if self._results in ready:
                    sources.remove(self._results)
                    results = self._receive()
                    kill_at = min(kill_at, time.monotonic() + GRACE)  # all results are sent: it ends by itself
                elif stop.waitable in ready:
                    sources.remove(stop.waitable)
                    _signal(self.process, signal.SIGTERM)
                    kill_at, deadline = time.monotonic() + grace, math.inf
                elif time.monotonic() >= kill_at:
                    _kill(self.process)
                    self.process.join()
                elif time.monotonic() >= deadline:
                    self.timed_out = True
                    _signal(self.process, signal.SIGTERM)
                    kill_at, deadline = time.monotonic() + grace, math.inf
            return results if self._results not in sources else self._receive()
        finally:
            if self.process.is_alive():
                _kill(self.process)
            self.process.join()
            self._lifeline.close()
            self._results.close()

    def _receive(self) -> list[JobResult] | None:
        try:
            return self._results.recv() if self._results.poll() else None
        except (EOFError, OSError):
            return None


_starting = threading.Lock()
"""multiprocessing is not made for starts in several threads at once."""


def _signal(process: BaseProcess, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        assert process.pid is not None
        os.kill(process.pid, number)


def _kill(process: BaseProcess) -> None:
    """Kill the process with its data-loading workers: it leads a process group of its own."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _signal(process, signal.SIGKILL)
