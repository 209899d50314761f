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
    """A cell and its fingerprint at the time of planning."""

    request: Request
    fingerprint: str


@dataclass(frozen=True)
class Job:
    """Cells that one process trains side by side. Plain values: they are sent to other machines.

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
    """The outcome of one cell of a job, with the reason from its run folder.

    The state `running` means that another process executes the run or has taken it over; the reason says which.
    """

    cell: JobCell
    outcome: Outcome
    warning: str | None = None
    """Why MLflow could not be updated."""
