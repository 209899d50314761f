"""One process's attempt at a run: holds the lock and writes the run folder's states, also after a failure.

The computation itself is in `run.py`. If several processes share a batch, only rank zero writes.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from harness.cells.resolve import Cell
from harness.engine.device import make_fabric
from harness.engine.failures import explained, is_bug, outcome_of
from harness.engine.options import ExecutionOptions
from harness.runs.locks import LockLost
from harness.runs.state import RunState
from harness.runs.store import RunStore
from harness.util.progress import Reporter


class RunAttempt:
    """A cell with its run folder, device and progress."""

    def __init__(
        self, cell: Cell, store: RunStore, options: ExecutionOptions, *, force: bool = False, quiet: bool = False
    ):
        """`force`: rerun a finished run. Raises `UserError` for a device that is not available."""
        self.cell, self.store, self.options = cell, store, options
        self.folder = store.folder(cell.spec)
        self.fabric = make_fabric(options.device, cell.spec.budget.precision)
        self.reporter = Reporter(quiet, silent=not self.fabric.is_global_zero)
        self.step = 0
        """Optimiser steps done so far."""
        self._from_start = force

    @property
    def writes(self) -> bool:
        return self.fabric.is_global_zero

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Raises `AlreadyLocked` where another process executes the run."""
        with self.store.lock(self.folder) if self.writes else contextlib.nullcontext() as self.folder.lock:
            yield

    def is_needed(self) -> bool:
        """Whether the run has no result yet or must be rerun."""
        state = self.store.outcome(self.folder).state
        if state is RunState.DAMAGED and self.folder.result_path.exists():
            self.reporter.line(f"{self.folder.result_path} is damaged; the run starts over")
            self._from_start = True
        needed = self._from_start or state is not RunState.DONE
        self.fabric.barrier()  # no process writes before all have checked
        return needed

    def begin(self) -> None:
        """Open the run folder: from now on the run is listed. With `force` an existing folder is archived first."""
        if self.writes:
            if self._from_start:
                self.store.archive(self.folder)
            self.folder.begin(self.cell.spec, self.store.attempt(self.folder))
            self.reporter.log_to(self.folder.log_path)

    @contextlib.contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Record every early end of a run as a state and a reason in its folder."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            raised = self.record_failure(error)
            if raised is error:
                raise
            raise raised from error
        finally:
            self.reporter.stop()

    def record_failure(self, error: BaseException) -> BaseException:
        """Write the outcome of a run that raised `error`; returns the exception to raise, see `explained`."""
        self.reporter.stop()
        try:
            self.folder.check_lock()
        except LockLost as lost:  # another process executes the run now and has removed the unfinished files
            return lost
        raised = explained(error, self.folder.path, self.step)
        outcome = outcome_of(raised)
        if self.writes and self.folder.path.exists():
            with contextlib.suppress(OSError):  # the disk may be full
                if is_bug(raised):
                    self.reporter.log("".join(traceback.format_exception(raised)))
                self.reporter.log(str(outcome))
                self.folder.finish(outcome)
        return raised
