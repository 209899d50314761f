"""One job in a process of its own, watched: a crash, a leak, a hang or a kill of it touches nothing else.

Every launcher calls `supervise`, in a thread, in a Ray task or in a Slurm job.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.claims import Claimed, ClaimLost
from harness.errors import UserError
from harness.launch import Ended, Job, Outcome
from harness.runs import RunFolder, RunStore

if TYPE_CHECKING:
    from harness.cells import Cell

ATTEMPTS = 3
"""How often a job is begun whose process ends without a word (killed, crashed): it goes on from its checkpoint."""
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


def supervise(job: Job, stop: Stop | None = None) -> Ended:
    """Execute the job in processes of its own until it has ended, and see that its run folder says how.

    A run that is done, or that another process executes, is left alone.
    """
    stop = stop or Stop()
    deadline = math.inf if job.seconds is None else time.monotonic() + job.seconds
    for _ in range(ATTEMPTS):
        attempt = _Attempt(job)
        told = attempt.watch(stop, deadline)
        if told is not None and (told.outcome == "done" or not attempt.late):
            return told
        if attempt.late:
            return recorded(job, f"took longer than its limit of {job.seconds:g} s (--time-limit)")
        if stop.asked:
            return Ended(job, "interrupted", stop.reason)
    return recorded(job, f"{_death(attempt.process.exitcode)}, {ATTEMPTS} times; {attempt.output} has its last words")


class _Attempt:
    """One process that executes the job, and the two lines to it."""

    def __init__(self, job: Job):
        self.job = job
        self.late = False
        context = multiprocessing.get_context("forkserver")
        # The server imports once what every job needs, and forks; it never touches an accelerator itself.
        context.set_forkserver_preload(["harness.launch.preload"])
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

    def watch(self, stop: Stop, deadline: float) -> Ended | None:
        """What the process told before it ended, or None; ends it when it is asked to stop or late."""
        grace = min(GRACE, self.job.seconds or GRACE)
        answer: Ended | None = None
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

    def _listen(self) -> Ended | None:
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


def recorded(job: Job, reason: str, outcome: Outcome = "failed") -> Ended:
    """Write into the run folder what its process could not write any more."""
    run = RunFolder(job.runs / job.fingerprint)
    if run.result() is not None:
        return Ended(job, "done")
    try:
        record_failure(job, reason, outcome)
    except Claimed as error:
        return Ended(job, "claimed", error.holder)
    except (UserError, OSError) as error:
        return Ended(job, outcome, f"{reason} ({error})")
    return Ended(job, outcome, reason)


def record_failure(job: Job, reason: str, outcome: Outcome = "failed", cell: Cell | None = None) -> None:
    """Make a run that ended without a word a visible row. Raises `Claimed`, `UserError` or `OSError`."""
    from harness.cells import resolve

    store = RunStore(job.runs)
    spec = (cell or resolve(job.request, store, job.data)).spec
    run = store.folder(spec)
    with store.claim(run) as run.claim:
        if run.result() is None:
            status = run.status()
            if status is None:
                run.begin(spec, store.attempt(run))
            assert outcome != "claimed"
            run.set_status(outcome, reason=reason)


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
    ended = _outcome(job)
    if ended.outcome != "failed":
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


def _outcome(job: Job) -> Ended:
    """Execute, and turn whatever comes of it into a word and a reason."""
    from harness import plugins
    from harness.cells import resolve
    from harness.execution import RunFailed, execute
    from harness.tracking import Mirror
    from harness.training import Interrupted

    if job.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)
    if job.threads:
        import torch

        torch.set_num_threads(job.threads)
    store = RunStore(job.runs)
    cell = None
    try:
        plugins.load(job.plugins)
        cell = resolve(job.request, store, job.data)
        if cell.spec.fingerprint != job.fingerprint:
            raise UserError("what it is made of (data, weights or a plugin's code) is not what it was when planned")
        mirror = Mirror(job.runs, job.tracking, lambda text: print(f"warning: {text}", flush=True))
        execute(cell, store, mirror, device=job.device, workers=job.workers, quiet=True,
                checkpoint_seconds=job.checkpoint_seconds)  # fmt: skip
        return Ended(job, "done")
    except Claimed as error:
        return Ended(job, "claimed", error.holder)
    except ClaimLost as error:
        return Ended(job, "claimed", str(error))
    except (Interrupted, KeyboardInterrupt) as error:
        return Ended(job, "interrupted", str(error) or None)
    except RunFailed as error:
        status = RunFolder(error.folder).status()
        return Ended(job, error.state, status.reason if status else str(error))
    except UserError as error:
        reason = str(error)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    with contextlib.suppress(UserError, OSError):
        if cell is not None:  # a failure before the run began has no folder yet
            record_failure(job, reason, cell=cell)
    return Ended(job, "failed", reason)
