"""The code of a job's own process: resolve its cells, execute them, send the results, and end with the launcher.

`supervise.py` starts and supervises the process. torch is only imported here, when a job has started.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from harness.cells import plugins
from harness.cells.resolve import Cell, Resolver
from harness.engine.options import ExecutionOptions
from harness.errors import UserError
from harness.launch.job import Job, JobCell, JobResult
from harness.runs.state import Outcome, RunState

GRACE = 30.0
"""Seconds that a job has to write a checkpoint when it is asked to stop, before it is killed."""


def run_job(job: Job, results: Connection, lifeline: Connection) -> None:
    """The body of the process. Sends one `JobResult` per cell, in order, to `results`."""
    os.setsid()  # the launcher handles Ctrl-C in its terminal
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops a Ctrl-C from before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    threading.Thread(target=_end_with_the_launcher, args=(lifeline,), daemon=True).start()
    output = output_file(job, os.getpid())
    _redirect_output(output)
    faulthandler.enable()
    found = _execute(job)
    if all(result.outcome.state is not RunState.FAILED for result in found):
        for written in output.parent.glob(f"{job.name}-*.txt"):  # also those of processes that were killed
            written.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        results.send(found)


def output_file(job: Job, pid: int) -> Path:
    """The file of the process's output; kept if a cell failed, since it may explain more than the run folder."""
    return job.options.runs / ".launch" / f"{job.name}-{pid}.txt"


def _end_with_the_launcher(lifeline: Connection) -> None:
    """Stop this job when the launcher dies, which closes the pipe; kill it if it does not stop in time."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def _redirect_output(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _execute(job: Job) -> list[JobResult]:
    """Execute the cells and return an outcome for each, whatever happens."""
    from harness.engine.failures import outcome_of
    from harness.engine.side_by_side import execute_side_by_side

    cells: dict[str, Cell] = {}
    outcomes: dict[str, Outcome] = {}
    warnings: list[str] = []
    store = job.options.open_store(warnings.append)
    try:
        _use_cores(job.options)
        plugins.load(job.options.plugins)
        resolve = Resolver(store, job.options.data)
        for planned in job.cells:
            try:
                cells[planned.fingerprint] = _resolve_as_planned(planned, resolve)
            except UserError as error:
                outcomes[planned.fingerprint] = outcome_of(error)
        ended = execute_side_by_side(
            list(cells.values()), store, job.options, expected_reuses=job.expected_reuses, quiet=True
        )
        outcomes |= zip(cells, ended, strict=True)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exception(error)
        outcomes |= {cell.fingerprint: outcome_of(error) for cell in job.cells if cell.fingerprint not in outcomes}
    for name, cell in cells.items():
        if outcomes[name].state is RunState.FAILED:  # it may have failed before its folder existed
            with contextlib.suppress(UserError, OSError):
                outcomes[name] = store.record(cell.spec, outcomes[name])
    warning = warnings[0] if warnings else None
    return [JobResult(cell, outcomes[cell.fingerprint], warning) for cell in job.cells]


def _use_cores(options: ExecutionOptions) -> None:
    """Use the cores and threads that the launcher assigned."""
    if options.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, options.cores)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)


def _resolve_as_planned(planned: JobCell, resolve: Resolver) -> Cell:
    """Resolve the cell. Raises `UserError` if its fingerprint has changed since planning."""
    cell = resolve(planned.request)
    if cell.spec.fingerprint != planned.fingerprint:
        raise UserError("its data, weights or plugin code changed since the plan was made; run the command again")
    return cell
