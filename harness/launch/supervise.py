"""Jobs in processes of their own, watched: a crash, a leak, a hang or a kill of one touches nothing else.

Every launcher calls `supervise`, in a thread, in a Ray task or in a Slurm job.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.launch.job import Job, JobResult, Outcome
from harness.runs.folder import RunFolder
from harness.runs.locks import AlreadyLocked
from harness.runs.state import Outcome as RunOutcome
from harness.runs.state import RunState
from harness.runs.store import RunStore
from harness.tracking.mirror import tracked_store
from harness.util.progress import say

if TYPE_CHECKING:
    from harness.cells.resolve import Cell, Resolver

ATTEMPTS = 3
"""How often a cell is begun whose process ends without a word (killed, crashed): it goes on from its checkpoint."""
GRACE = 30.0
"""Seconds that a job has to write a checkpoint when it is asked to stop, before it is killed."""


class Stop:
    """Tells `supervise` to end its job. Can be set from another thread."""

    def __init__(self) -> None:
        self._reader, self._writer = multiprocessing.Pipe(duplex=False)
        self.reason: str | None = None

    def __call__(self, reason: str | None = None) -> None:
        if not self.asked:
            self.reason = reason
            self._writer.send(None)

    @property
    def asked(self) -> bool:
        return self._reader.poll()

    @property
    def waitable(self) -> Connection:
        return self._reader


def supervise(job: Job, stop: Stop | None = None) -> list[JobResult]:
    """Execute the job in processes of its own until all its cells have ended, and see that their run folders say how.

    One `JobResult` a cell, in the job's order. A run that is done, or that another process executes, is left alone.
    Cells share a process for as long as that goes well: what one of them does to it, and what is too much for all
    at once, costs the others no result: a cell that has not ended by then is executed alone.
    """
    stop = stop or Stop()
    ended, deaths = _together(job, stop) if job.beside else ({}, 0)
    return [ended.get(cell.fingerprint) or _alone(cell, stop, deaths) for cell in job.members]


def _alone(job: Job, stop: Stop, deaths: int) -> JobResult:
    """One cell. `deaths`: attempts at it that have ended without a word before."""
    deadline = math.inf if job.seconds is None else time.monotonic() + job.seconds
    for _ in range(deaths, ATTEMPTS):
        if stop.asked:
            break
        attempt = _Attempt(job)
        (told,) = attempt.watch(stop, deadline) or [None]
        if told is not None and (told.outcome == "done" or not attempt.late):
            return told
        if attempt.late:
            return recorded(job, f"took longer than its limit of {job.seconds:g} s (--time-limit)")
    if stop.asked:
        return stopped(job, stop.reason)
    return recorded(job, f"{_death(attempt.process.exitcode)}, {ATTEMPTS} times; {attempt.output} has its last words")


def _together(job: Job, stop: Stop) -> tuple[dict[str, JobResult], int]:
    """Several cells in one process: what became of those that need not be executed alone, by fingerprint, and how often
    the process ended without a word.

    The last attempt is not made here: it is each one's own.
    """
    deadline = math.inf if job.seconds is None else time.monotonic() + job.seconds * len(job.members)
    ended: dict[str, JobResult] = {}
    for deaths in range(ATTEMPTS - 1):
        left = [cell for cell in job.members if cell.fingerprint not in ended]
        if not left or stop.asked:
            break
        attempt = _Attempt(_as_one(left))
        told = attempt.watch(stop, deadline)
        found = told if told is not None else _recorded_by(left, attempt.process)
        ended |= {one.job.fingerprint: one for one in found if _stands(one, attempt, stop)}
        if told is not None or attempt.late:
            return ended, deaths
    return ended, ATTEMPTS - 1


def _as_one(cells: list[Job]) -> Job:
    """The job of all of them: the reverse of `Job.members`."""
    first, *others = cells
    return replace(first, beside=tuple((other.request, other.fingerprint) for other in others))


def _stands(one: JobResult, attempt: _Attempt, stop: Stop) -> bool:
    """Whether a cell of several has ended as it would have alone, where it has more memory and its own time limit."""
    return one.outcome != "out_of_memory" and (one.outcome != "interrupted" or stop.asked or not attempt.late)


def of_members(job: Job, ended: list[JobResult]) -> list[JobResult]:
    """What became of a job's cells where it was executed, told of the job as it was submitted."""
    return [replace(one, job=cell) for one, cell in zip(ended, job.members, strict=True)]


def stopped(job: Job, reason: str | None = None) -> JobResult:
    """What became of one cell whose process was asked to end, and had nothing to tell."""
    run = RunFolder(job.runs / job.fingerprint)
    if run.result() is not None:
        return JobResult(job, "done")
    status = run.status()
    if status is not None and status.state is RunState.RUNNING:  # it was killed before it could say so
        return recorded(job, reason or "killed", "interrupted")
    return JobResult(job, "interrupted", reason)


def _recorded_by(cells: list[Job], process: BaseProcess) -> list[JobResult]:
    """What became of those cells that had ended before the process did, by their folders."""
    found = []
    for cell in cells:
        run = RunFolder(cell.runs / cell.fingerprint)
        status = run.status()
        if run.result() is not None:
            found.append(JobResult(cell, RunState.DONE))
        elif status is not None and status.pid == process.pid and status.state not in ("running", "interrupted"):
            found.append(JobResult(cell, status.state, status.reason))
    return found


class _Attempt:
    """One process that executes the cells of a job, and the two lines to it."""

    def __init__(self, job: Job):
        self.job = job
        self.late = False
        context = multiprocessing.get_context("forkserver")
        # The server imports once what every job needs, and forks; it never touches an accelerator itself.
        context.set_forkserver_preload(["harness.launch.job.preload"])
        self._told, tell = context.Pipe(duplex=False)
        alive, self._lifeline = context.Pipe(duplex=False)
        self.process = context.Process(target=_execute_job, args=(job, tell, alive), name=job.fingerprint)
        with _starting:
            resource_tracker.ensure_running()  # it unblocks what it has blocked for itself
            with _signals_held_back():
                self.process.start()
        tell.close()
        alive.close()
        assert self.process.pid is not None
        self.output = _output(job, self.process.pid)

    def watch(self, stop: Stop, deadline: float) -> list[JobResult] | None:
        """What the process told before it ended, or None; ends it when it is asked to stop or late."""
        grace = min(GRACE, self.job.seconds or GRACE)
        answer: list[JobResult] | None = None
        listened: list[Any] = [self.process.sentinel, self._told, stop.waitable]
        kill_at = math.inf
        try:
            while self.process.is_alive():
                limit = min(deadline, kill_at)
                ready = connection.wait(listened, None if limit == math.inf else max(0.0, limit - time.monotonic()))
                if self._told in ready:
                    listened.remove(self._told)
                    answer = self._listen()
                    kill_at = min(kill_at, time.monotonic() + GRACE)  # it has nothing left to do but to end
                elif stop.waitable in ready:
                    listened.remove(stop.waitable)
                    _signal(self.process, signal.SIGTERM)
                    kill_at, deadline = time.monotonic() + grace, math.inf
                elif time.monotonic() >= kill_at:
                    _kill(self.process)
                    self.process.join()
                elif time.monotonic() >= deadline:
                    self.late = True
                    _signal(self.process, signal.SIGTERM)
                    kill_at, deadline = time.monotonic() + grace, math.inf
            return answer if self._told not in listened else self._listen()
        finally:
            if self.process.is_alive():
                _kill(self.process)
            self.process.join()
            self._lifeline.close()
            self._told.close()

    def _listen(self) -> list[JobResult] | None:
        try:
            return self._told.recv() if self._told.poll() else None
        except (EOFError, OSError):
            return None


_starting = threading.Lock()
"""The first start also starts the server that forks."""

_SENT_TO_ALL = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
"""What a batch system sends to every process of a job: the server must outlive it, and see its jobs end."""


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """What is started meanwhile inherits that they are blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SENT_TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signal(process: BaseProcess, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        assert process.pid is not None
        os.kill(process.pid, number)


def _kill(process: BaseProcess) -> None:
    """With its data-loading workers: it leads a group of its own."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _signal(process, signal.SIGKILL)


def recorded(job: Job, reason: str, outcome: Outcome = "failed") -> JobResult:
    """Write into the run folder what its process could not write any more."""
    run = RunFolder(job.runs / job.fingerprint)
    if run.result() is not None:
        return JobResult(job, "done")
    try:
        record_failure(job, reason, outcome)
    except AlreadyLocked as error:
        return JobResult(job, "claimed", error.lock_owner)
    except (UserError, OSError) as error:
        return JobResult(job, outcome, f"{reason} ({error})")
    return JobResult(job, outcome, reason)


def record_failure(
    job: Job, reason: str, outcome: Outcome = "failed", cell: Cell | None = None, store: RunStore | None = None
) -> None:
    """Make a run that ended without a word a visible row, also in MLflow.

    `store` is the tracked store of `job.runs` where there is one. Raises `AlreadyLocked`, `UserError` or `OSError`.
    """
    from harness.cells.resolve import resolve

    store = store or tracked_store(job.runs, job.tracking, say)
    spec = (cell or resolve(job.request, store, job.data)).spec
    run = store.folder(spec)
    with store.lock(run) as run.lock:
        if run.result() is None:
            if run.status() is None:
                run.begin(spec, store.attempt(run))
            assert outcome != "claimed"
            run.finish(RunOutcome(RunState(outcome), reason))


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        cause = "; the machine's memory may have run out" if -code == signal.SIGKILL else ""
        return f"the process was ended by {name}{cause}"
    return f"the process ended with code {code}"


def _output(job: Job, pid: int) -> Path:
    """What the job's process prints; kept where it may say more than the run folder does."""
    return job.runs / ".launch" / f"{job.fingerprint}-{pid}.txt"


# ---- in the job's own process ----------------------------------------------------------------------------------------


def _execute_job(job: Job, tell: Connection, alive: Connection) -> None:
    os.setsid()  # Ctrl-C in the launcher's terminal is the launcher's to pass on
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_launcher, args=(alive,), daemon=True).start()
    output = _output(job, os.getpid())
    _print_into(output)
    faulthandler.enable()
    ended = _outcomes(job)
    if all(one.outcome != "failed" for one in ended):
        output.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        tell.send(ended)


def _end_with_the_launcher(alive: Connection) -> None:
    """A launcher that dies closes the line; then this job stops as if it had been asked to, and is made to."""
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def _print_into(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _outcomes(job: Job) -> list[JobResult]:
    """Execute, and turn whatever comes of each cell into a word and a reason."""
    from harness.cells import plugins
    from harness.cells.resolve import Resolver
    from harness.engine.run import outcome_of

    cells: dict[str, Cell] = {}
    told: dict[str, tuple[Outcome, str | None]] = {}
    of_the_rest: tuple[Outcome, str | None]
    try:
        _settle(job)
        plugins.load(job.plugins)
        resolve = Resolver(RunStore(job.runs), job.data)
        for member in job.members:
            try:
                cells[member.fingerprint] = _as_planned(member, resolve)
            except UserError as error:
                told[member.fingerprint] = outcome_of(error)
        told |= zip(cells, _execute(job, list(cells.values())), strict=True)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exception(error)
        of_the_rest = outcome_of(error)
    ended = [JobResult(member, *(told.get(member.fingerprint) or of_the_rest)) for member in job.members]
    for one in ended:
        if one.outcome == "failed" and one.job.fingerprint in cells:  # it may have failed before it had a folder
            with contextlib.suppress(UserError, OSError):
                record_failure(one.job, one.reason or "", cell=cells[one.job.fingerprint])
    return ended


def _settle(job: Job) -> None:
    """Into the cores and threads that the job was given."""
    if job.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)
    if job.threads:
        import torch

        torch.set_num_threads(job.threads)


def _as_planned(job: Job, resolve: Resolver) -> Cell:
    """Raises `UserError` where its cell is not the one that was planned."""
    cell = resolve(job.request)
    if cell.spec.fingerprint != job.fingerprint:
        raise UserError("what it is made of (data, weights or a plugin's code) is not what it was when planned")
    return cell


def _execute(job: Job, cells: list[Cell]) -> list[tuple[Outcome, str | None]]:
    """How each of the cells ended, and why, in their order. Of a single one it raises what `execute` does."""
    from harness.engine.run import execute, execute_together
    from harness.tracking.mirror import Mirror

    store = RunStore(job.runs)
    mirror = Mirror(job.runs, job.tracking, lambda text: print(f"warning: {text}", flush=True))
    given: dict[str, Any] = {
        "device": job.device,
        "workers": job.workers,
        "quiet": True,
        "checkpoint_seconds": job.checkpoint_seconds,
        "cache_bytes": job.cache_bytes,
        "more": job.more,
    }
    if len(cells) != 1:
        return execute_together(cells, store, mirror, **given)
    execute(cells[0], store, mirror, **given)
    return [("done", None)]
