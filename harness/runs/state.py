"""The states and the outcome of a run: the one vocabulary of run folders, plans, reports and MLflow."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class RunState(enum.StrEnum):
    """The state of a run. Its value is used in files and `--json`."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """Stopped or killed before its end; the same command resumes it."""
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    """Took longer than `--time-limit`."""
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    UNSUPPORTED = "unsupported"
    """The method does not support the backbone."""

    # Derived and never written to a folder.
    DAMAGED = "damaged"
    """Its files cannot be read; it will be rerun."""
    TO_DO = "to do"
    """Never started."""
    WAITING = "waiting"
    """Waits for its search, which selects its hyperparameters."""
    NO_DATA = "no data"
    """Cannot be started: the files of its dataset are not on this machine."""

    @property
    def final(self) -> bool:
        """Whether a rerun would end in the same state. A study executes runs in all other states."""
        return self in (RunState.DONE, RunState.DIVERGED, RunState.UNSUPPORTED)

    @property
    def failed(self) -> bool:
        """Whether the run ended without an expected result."""
        return self in (
            RunState.FAILED, RunState.TIMED_OUT, RunState.DIVERGED, RunState.OUT_OF_MEMORY, RunState.NO_DATA
        )  # fmt: skip

    @property
    def mlflow(self) -> str:
        """MLflow's name for the state."""
        return _MLFLOW.get(self, "FAILED")

    @property
    def label(self) -> str:
        """The text for tables: without underscores."""
        return self.value.replace("_", " ")


_MLFLOW = {
    RunState.RUNNING: "RUNNING",
    RunState.TO_DO: "SCHEDULED",
    RunState.WAITING: "SCHEDULED",
    RunState.DONE: "FINISHED",
    RunState.INTERRUPTED: "KILLED",
    RunState.TIMED_OUT: "KILLED",
}


@dataclass(frozen=True)
class Outcome:
    """The state of a run with its reason. Plain values: it is sent between processes."""

    state: RunState
    reason: str | None = None
    """One line; None if the state needs none."""
    step: int | None = None
    """Optimiser steps done; None: unchanged."""

    def __str__(self) -> str:
        return f"{self.state.label}: {self.reason}" if self.reason else self.state.label


class RunEnded(Exception):
    """A run ended without a result. If `execute` raises it, the outcome is recorded in the run's folder."""

    def __init__(self, outcome: Outcome):
        super().__init__(str(outcome))
        self.outcome = outcome

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.outcome,)
