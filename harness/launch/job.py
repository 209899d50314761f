"""A job: the cells that one process executes, with the options they share. A launcher only decides where and when.

Results are in the run folders, which all machines share; the locks on them make several launchers safe at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from harness.cells.resolve import Request
from harness.engine.options import ExecutionOptions
from harness.runs.state import Outcome


class JobCell(NamedTuple):
    """A cell, and the fingerprint that it had when it was planned."""

    request: Request
    fingerprint: str


@dataclass(frozen=True)
class Job:
    """Cells that one process trains side by side. Plain values: it travels to other machines.

    `options.runs`, `.data` and `.plugins` are absolute paths.
    """

    cells: tuple[JobCell, ...]
    options: ExecutionOptions
    expected_reuses: int = 0
    """How many further runs are expected that see the same training images through the same frozen backbone."""

    @property
    def name(self) -> str:
        """The fingerprint of its first cell."""
        return self.cells[0].fingerprint


@dataclass(frozen=True)
class JobResult:
    """How one cell of a job ended, with the reason that its run folder gives.

    The state `running` means that another process executes the run, or has taken it over; the reason says which.
    """

    cell: JobCell
    outcome: Outcome
