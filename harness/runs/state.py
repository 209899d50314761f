"""The states of a run, and how a run ended: the one vocabulary of run folders, plans, reports and MLflow."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class RunState(enum.StrEnum):
    """How far a run is. Its value is what files and `--json` hold."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """Stopped before its end; the same command resumes it."""
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    """Took longer than `--time-limit`."""
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    UNSUPPORTED = "unsupported"
    """The method does not go with the backbone."""

    # Derived from the folder and never written to it.
    DAMAGED = "damaged"
    """Done once, but its files cannot be read; it is executed again."""
    TO_DO = "to do"
    """Never begun."""
    WAITING = "waiting"
    """For its search to end, which decides its hyperparameters."""

    @property
    def final(self) -> bool:
        """Whether repeating the run would end the same. A study tries every other state again."""
        return self in (RunState.DONE, RunState.DIVERGED, RunState.UNSUPPORTED)

    @property
    def failed(self) -> bool:
        """Whether the run ended without a result that it should have had."""
        return self in (RunState.FAILED, RunState.TIMED_OUT, RunState.DIVERGED, RunState.OUT_OF_MEMORY)

    @property
    def mlflow(self) -> str:
        """MLflow's name for it."""
        return _MLFLOW.get(self, "FAILED")

    @property
    def label(self) -> str:
        """For people: without underscores."""
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
    """How a run ended, or how far it is. Plain values: it travels between processes."""

    state: RunState
    reason: str | None = None
    """One line; None where there is nothing to say."""
    step: int | None = None
    """Optimiser steps done; None: as the folder says."""

    def __str__(self) -> str:
        return f"{self.state.label}: {self.reason}" if self.reason else self.state.label


class RunEnded(Exception):
    """A run ended without a result. Where `execute` raises it, the run's folder says the same."""

    def __init__(self, outcome: Outcome):
        super().__init__(str(outcome))
        self.outcome = outcome

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.outcome,)
