"""Where runs execute: here in processes of their own, on a Ray cluster, or on Slurm; all three run `supervise`.

A launcher only says where and when. What came out is in the run folders, which all machines share; the claims on them
make any number of launchers safe side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from harness.cells.resolve import Request
from harness.runs.state import RunState

Outcome = RunState | Literal["claimed"]
"""How the execution of a job ended; `claimed`: another process executes the run, or has taken it over."""


@dataclass(frozen=True)
class Job:
    """A cell to execute, or several in one process, and the circumstances, which change no figure.

    Plain values: it travels to other machines.
    """

    request: Request
    fingerprint: str
    runs: Path
    data: Path
    beside: tuple[tuple[Request, str], ...] = ()
    """Further cells with their fingerprints, which the same process executes side by side with the first."""
    tracking: str | None = None
    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    """Of torch on a CPU; None leaves torch's own choice."""
    cores: tuple[int, ...] = ()
    """Which this job may use; none: all."""
    seconds: float | None = None
    """The most that each cell may take, in all its attempts; None: no limit."""
    checkpoint_seconds: float = 30
    plugins: tuple[str, ...] = ()
    cache_bytes: int = 0
    """What frozen features may take on disk, those of all jobs together; 0: none are kept."""
    more: int = 0
    """How many further runs are expected that see the same training images with the same frozen backbone."""

    @property
    def members(self) -> tuple[Job, ...]:
        """A job for each of its cells alone, in order."""
        cells = ((self.request, self.fingerprint), *self.beside)
        return tuple(replace(self, request=request, fingerprint=name, beside=()) for request, name in cells)


@dataclass(frozen=True)
class JobResult:
    """What became of one cell of a job; `job` has that cell alone. The reason is that of the run's status."""

    job: Job
    outcome: Outcome
    reason: str | None = None
