"""The loop that executes cells and searches on a launcher until nothing is left, whatever becomes of each of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cells import Request, Resolver
from harness.claims import LEASE
from harness.console import say
from harness.launch import Ended, Job, Launcher
from harness.plugins import loaded_files
from harness.runs import RunStore
from harness.tracking import Mirror
from studies.plan import FINAL, PlannedCell, PlannedSearch, refresh, settle

if TYPE_CHECKING:
    from studies.findings import Conclusion
    from studies.search import Search

LOOK_SECONDS = 2.0
"""How often runs that other processes execute, and searches that others work on, are looked at."""
TAKEN_UP_AGAIN = 3
"""How often a run is taken up again that ended as interrupted though nobody here asked for it."""


@dataclass
class Row:
    """A search and, in a study, the rows whose cells wait for it; `width` of its trials at a time.

    One at a time, what it proposes does not depend on what runs side by side: so it is in studies.
    """

    search: Search
    planned: list[PlannedSearch] = field(default_factory=list)
    width: int = 1
    conclusion: Conclusion | None = None
    """When the search has ended."""


@dataclass(frozen=True)
class Circumstances:
    """What every job is given, and no figure depends on."""

    store: RunStore
    data: Path
    tracking: str | None = None
    workers: int | None = None
    seconds: float | None = None
    """The most that one cell may take."""
    checkpoint_seconds: float = 30
    say: Callable[[str], None] = say
    """Takes a line for the user."""

    def job(self, request: Request, fingerprint: str) -> Job:
        return Job(
            request=request,
            fingerprint=fingerprint,
            runs=self.store.root.absolute(),
            data=self.data.absolute(),
            tracking=self.tracking,
            workers=self.workers,
            seconds=self.seconds,
            checkpoint_seconds=self.checkpoint_seconds,
            plugins=tuple(str(path) for path in loaded_files()),
        )


class Drive:
    """Cells and searches on one launcher. Any number of drives may work on the same ones: a run is executed by one.

    `on_change` is called when something ended or began, and every `LOOK_SECONDS`.
    """

    def __init__(
        self,
        launcher: Launcher,
        circumstances: Circumstances,
        resolve: Resolver,
        cells: list[PlannedCell],
        rows: list[Row],
        on_change: Callable[[PlannedCell | Row | None], None] = lambda changed: None,
    ):
        self._launcher = launcher
        self._circumstances = circumstances
        self._store = circumstances.store
        self._resolve = resolve
        self._cells = deque(cell for cell in cells if cell.state not in (*FINAL, "waiting") and cell.spec is not None)
        self._rows = list(rows)
        self._on_change = on_change
        self._in_flight: dict[str, list[PlannedCell] | Row] = {}
        self._elsewhere: list[tuple[PlannedCell, float]] = []
        self._again: dict[str, int] = {}
        self._looked = 0.0
        self._mirror = Mirror(self._store.root, circumstances.tracking, circumstances.say)

    def run(self) -> None:
        """Returns when every cell and search has ended. Ctrl-C passes through, with what runs still running."""
        while self._in_flight or self._cells or self._elsewhere or self._rows:
            begun = self._submit()
            if not begun and not self._in_flight:
                time.sleep(0.2)  # all that is left is elsewhere
            for ended in self._launcher.wait(0.5 if self._in_flight else 0):
                self._take(ended)
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self._look()
                self._looked = time.monotonic()
            for row in [row for row in self._rows if row.search.finished and not self._works_for(row)]:
                self._finish(row)

    def _submit(self) -> bool:
        begun = False
        while self._launcher.free > 0:
            job = self._next()
            if job is None:
                break
            self._launcher.submit(job)
            begun = True
        return begun

    def _next(self) -> Job | None:
        """Cells that can be run go before trials: they end a row."""
        for _ in range(len(self._cells)):
            cell = self._cells.popleft()
            assert cell.fingerprint is not None
            if cell.fingerprint in self._in_flight:  # two rows that come to the same run
                running = self._in_flight[cell.fingerprint]
                if isinstance(running, list):
                    running.append(cell)
                    continue
                self._cells.append(cell)
                continue
            self._in_flight[cell.fingerprint] = [cell]
            cell.state, cell.reason = "running", None
            self._on_change(cell)
            return self._circumstances.job(cell.request, cell.fingerprint)
        for row in self._rows:
            if self._works_for(row) >= row.width:
                continue
            trial = row.search.next()
            if trial is None:
                continue
            if trial.fingerprint in self._in_flight:  # of another row's search, with the same hyperparameters
                row.search.ended(trial.fingerprint, "claimed", None)
                continue
            self._in_flight[trial.fingerprint] = row
            self._on_change(row)
            return self._circumstances.job(trial.request, trial.fingerprint)
        return None

    def _works_for(self, row: Row) -> int:
        return sum(1 for task in self._in_flight.values() if task is row)

    def _take(self, ended: Ended) -> None:
        fingerprint = ended.job.fingerprint
        task = self._in_flight.pop(fingerprint)
        again = ended.outcome == "interrupted" and self._take_up_again(fingerprint)
        if isinstance(task, Row):
            outcome = "failed" if ended.outcome == "interrupted" and not again else ended.outcome
            task.search.ended(fingerprint, outcome, ended.reason)
            self._mirror.update_search(task.search.folder.path)
            self._on_change(task)
            return
        for cell in task:
            if ended.outcome == "claimed":
                cell.state, cell.reason = "running", f"executed by {ended.reason}"
                self._elsewhere.append((cell, time.monotonic()))
            elif again:
                self._cells.append(cell)
            else:
                refresh(cell, self._store)
                if ended.outcome != "done":  # the folder may not have been writable
                    cell.state, cell.reason = ended.outcome, ended.reason
            self._on_change(cell)

    def _take_up_again(self, fingerprint: str) -> bool:
        self._again[fingerprint] = self._again.get(fingerprint, 0) + 1
        return self._again[fingerprint] <= TAKEN_UP_AGAIN

    def _look(self) -> None:
        for cell, since in list(self._elsewhere):
            assert cell.spec is not None
            free = self._store.holder(self._store.folder(cell.spec)) is None
            # Of a holder on another machine only its lease is seen; a job watches that for a beat, and takes over.
            if free or time.monotonic() - since > LEASE:
                self._elsewhere.remove((cell, since))
                refresh(cell, self._store)
                if cell.state not in FINAL and cell.state != "failed":
                    self._cells.append(cell)
                self._on_change(cell)
        for row in self._rows:
            for fingerprint in row.search.poll():
                if self._in_flight.get(fingerprint) is row:
                    self._launcher.stop(fingerprint)
        self._on_change(None)

    def _finish(self, row: Row) -> None:
        self._rows.remove(row)
        row.conclusion = row.search.conclude()
        self._mirror.update_search(row.search.folder.path, final=True)
        for planned in row.planned:
            settle(planned, self._resolve, self._store)
            self._cells += [cell for cell in planned.cells if cell.state not in FINAL and cell.spec is not None]
        self._on_change(row)
