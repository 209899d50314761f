"""The loop that executes cells and searches on a launcher until nothing is left, whatever becomes of each of them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cells.plugins import loaded_files
from harness.cells.resolve import Request, Resolver
from harness.launch.job import Job, JobResult
from harness.launch.launcher import Launcher
from harness.runs.locks import LEASE
from harness.runs.store import RunStore
from harness.spec import SharedDataKey
from harness.tracking.mirror import Mirror
from harness.util.progress import say
from studies.plan import FINAL, PlannedCell, PlannedSearch, refresh, settle

if TYPE_CHECKING:
    from studies.search.search import Search, TrialJob
    from studies.search.spec import SearchSpec
    from studies.search.summary import Conclusion

LOOK_SECONDS = 2.0
"""How often runs that other processes execute, and searches that others work on, are looked at."""
TAKEN_UP_AGAIN = 3
"""How often a run is taken up again that ended as interrupted though nobody here asked for it."""


@dataclass
class SearchTask:
    """A search and, in a study, the rows whose cells wait for it.

    `jobs` have its trials at a time. With one, and one trial in it, what is proposed does not depend on what runs side
    by side: so it is in studies, as long as they are not to execute cells together.
    """

    search: Search
    planned: list[PlannedSearch] = field(default_factory=list)
    jobs: int = 1
    conclusion: Conclusion | None = None
    """When the search has ended."""

    def together(self, asked: int) -> int:
        """How many of its trials a job may have, where it may have so many cells.

        A pruner ends trials one by one, and the memory of one network is not known where there are several.
        """
        spec = self.search.spec
        return asked if spec.pruner is None and "memory" not in spec.objectives else 1


def _images_of(cell: PlannedCell) -> SharedDataKey:
    assert cell.spec is not None
    return SharedDataKey.of(cell.spec)


def _images_of_trials(spec: SearchSpec) -> SharedDataKey:
    return SharedDataKey(spec.backbone, spec.weights, spec.data_digest, spec.budget, spec.seed, "dev")


@dataclass(frozen=True)
class ExecutionOptions:
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
    together: int = 1
    """How many cells that see the same images one job may have."""
    cache_bytes: int = 0
    """What frozen features may take on disk."""

    def job(
        self, request: Request, fingerprint: str, beside: tuple[tuple[Request, str], ...] = (), more: int = 0
    ) -> Job:
        return Job(
            request=request,
            fingerprint=fingerprint,
            beside=beside,
            runs=self.store.root.absolute(),
            data=self.data.absolute(),
            tracking=self.tracking,
            workers=self.workers,
            seconds=self.seconds,
            checkpoint_seconds=self.checkpoint_seconds,
            plugins=tuple(str(path) for path in loaded_files()),
            cache_bytes=self.cache_bytes,
            more=more,
        )


class Scheduler:
    """Cells and searches on one launcher. Any number of drives may work on the same ones: a run is executed by one.

    `on_change` is called when something ended or began, and every `LOOK_SECONDS`.
    """

    def __init__(
        self,
        launcher: Launcher,
        options: ExecutionOptions,
        resolve: Resolver,
        cells: list[PlannedCell],
        rows: list[SearchTask],
        on_change: Callable[[PlannedCell | SearchTask | None], None] = lambda changed: None,
    ):
        self._launcher = launcher
        self._circumstances = options
        self._store = options.store
        self._resolve = resolve
        self._cells = deque(cell for cell in cells if cell.state not in (*FINAL, "waiting") and cell.spec is not None)
        self._rows = list(rows)
        self._on_change = on_change
        self._in_flight: dict[str, list[PlannedCell] | SearchTask] = {}
        self._elsewhere: list[tuple[PlannedCell, float]] = []
        self._again: dict[str, int] = {}
        self._looked = 0.0
        self._mirror = Mirror(self._store.root, options.tracking, options.say)

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
        """Cells that can be run go before trials, as they end a row; where they may share a job they wait for company,
        as long as there are trials to begin.
        """
        most = self._most_together()
        if self._circumstances.together == 1:
            return self._job_of_cells(most) or self._job_of_trials(most)
        return self._job_of_trials(most) or self._job_of_cells(most)

    def _job_of_cells(self, most: int) -> Job | None:
        cells = self._next_cells(most)
        if not cells:
            return None
        return self._job(_images_of(cells[0]), [(cell.request, cell.fingerprint or "") for cell in cells])

    def _job_of_trials(self, most: int) -> Job | None:
        for row in self._rows:
            if trials := self._next_trials(row, most):
                named = [(trial.request, trial.fingerprint) for trial in trials]
                return self._job(_images_of_trials(row.search.spec), named)
        return None

    def _most_together(self) -> int:
        """How many cells the next job may have: not so many that a slot would have none for it."""
        asked = self._circumstances.together
        if asked == 1:
            return 1
        ready = len(self._cells) + sum(self._room(row) for row in self._rows)
        a_free_slot = math.ceil(ready / self._launcher.free)
        a_slot = math.ceil((ready + len(self._in_flight)) / self._launcher.slots)
        return max(1, min(asked, a_free_slot, a_slot))

    def _next_cells(self, most: int) -> list[PlannedCell]:
        """The first cell that can be begun and, up to `most`, others that see the same images; the rest keep their
        order.
        """
        taken: list[PlannedCell] = []
        for _ in range(len(self._cells)):
            cell = self._cells.popleft()
            assert cell.fingerprint is not None
            running = self._in_flight.get(cell.fingerprint)
            if isinstance(running, list):  # two rows that come to the same run
                running.append(cell)
            elif running is not None or len(taken) == most or not self._goes_with(cell, taken):
                self._cells.append(cell)
            else:
                taken.append(cell)
                self._in_flight[cell.fingerprint] = [cell]
                cell.state, cell.reason = "running", None
                self._on_change(cell)
        return taken

    def _goes_with(self, cell: PlannedCell, others: list[PlannedCell]) -> bool:
        """Whether one process may execute them: see `SharedDataKey`, and `_is_last_try`."""
        return not others or (
            _images_of(cell) == _images_of(others[0])
            and not any(self._is_last_try(one.fingerprint) for one in (cell, others[0]))
        )

    def _is_last_try(self, fingerprint: str | None) -> bool:
        """Of a run that ended as interrupted again and again: it is made alone, as it may be what its jobs end by."""
        return self._again.get(fingerprint or "", 0) >= TAKEN_UP_AGAIN

    def _next_trials(self, row: SearchTask, most: int) -> list[TrialJob]:
        """Up to so many trials of a search that can be begun now."""
        begun: list[TrialJob] = []
        while len(begun) < row.together(most) and self._room(row) and (trial := row.search.next()):
            if trial.fingerprint in self._in_flight:  # of another row's search, with the same hyperparameters
                row.search.ended(trial.fingerprint, "claimed", None)
                break
            self._in_flight[trial.fingerprint] = row
            begun.append(trial)
            if self._is_last_try(trial.fingerprint):
                break
        if begun:
            self._on_change(row)
        return begun

    def _room(self, row: SearchTask) -> int:
        """How many more trials of a search may be in flight, as far as is known."""
        width = row.jobs * row.together(self._circumstances.together)
        return max(0, min(width, row.search.left) - self._works_for(row))

    def _job(self, images: SharedDataKey, cells: list[tuple[Request, str]]) -> Job:
        """The job of these cells, which are in flight by now."""
        (request, fingerprint), *beside = cells
        return self._circumstances.job(request, fingerprint, tuple(beside), self._still_to_come(images))

    def _still_to_come(self, images: SharedDataKey) -> int:
        """How many runs are not begun yet that see these images, those that wait for their searches included."""
        count = sum(_images_of(cell) == images for cell in self._cells)
        for row in self._rows:
            of_trials = _images_of_trials(row.search.spec)
            if of_trials == images:
                count += max(0, row.search.left - self._works_for(row))
            waiting = (cell.request for planned in row.planned for cell in planned.cells if cell.state == "waiting")
            count += sum(of_trials._replace(seed=request.seed, part=request.part) == images for request in waiting)
        return count

    def _works_for(self, row: SearchTask) -> int:
        return sum(1 for task in self._in_flight.values() if task is row)

    def _take(self, ended: JobResult) -> None:
        fingerprint = ended.job.fingerprint
        task = self._in_flight.pop(fingerprint)
        again = ended.outcome == "interrupted" and self._take_up_again(fingerprint)
        if isinstance(task, SearchTask):
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
            free = self._store.lock_owner(self._store.folder(cell.spec)) is None
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

    def _finish(self, row: SearchTask) -> None:
        self._rows.remove(row)
        row.conclusion = row.search.conclude()
        self._mirror.update_search(row.search.folder.path, final=True)
        for planned in row.planned:
            settle(planned, self._resolve, self._store)
            self._cells += [cell for cell in planned.cells if cell.state not in FINAL and cell.spec is not None]
        self._on_change(row)
