"""The loop that executes cells and searches on a launcher until all have ended, successfully or not.

It decides which cells share a job; the launcher decides where jobs run, and a search what to try next.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from harness.cells.plugins import loaded_files
from harness.cells.resolve import Resolver
from harness.engine.options import ExecutionOptions
from harness.launch.job import Job, JobCell, JobResult
from harness.launch.launcher import Launcher
from harness.runs.locks import lease_seconds
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.spec import SharedDataKey
from harness.tracking.mirror import Mirror
from harness.util.progress import warn
from studies.plan import PlannedCell, PlannedSearch, refresh, settle

if TYPE_CHECKING:
    from studies.search.search import Search, TrialJob
    from studies.search.summary import Conclusion

POLL_SECONDS = 2.0
"""Seconds between two checks of runs and searches that other processes execute."""
RESUMES = 3
"""How often a run that was interrupted from outside is resumed."""

OnChange = Callable[["PlannedCell | SearchTask | None"], None]
OpenSearches = Callable[[list[PlannedSearch]], "list[SearchTask]"]


@dataclass
class SearchTask:
    """A search and, in a study, the planned searches that it completes.

    At most `jobs` jobs execute its trials at a time, or as many as there are slots if what is tried does not depend on
    scores. With one job of one trial no proposal depends on timing: that is the default in studies, unless cells share
    jobs.
    """

    search: Search
    planned: list[PlannedSearch] = field(default_factory=list)
    jobs: int = 1
    conclusion: Conclusion | None = None
    """Set when the search has ended."""

    @property
    def data_key(self) -> SharedDataKey:
        spec = self.search.spec
        return SharedDataKey(spec.backbone, spec.weights, spec.data_digest, spec.budget, spec.seed, "dev")

    def trials_per_job(self, limit: int) -> int:
        """How many of its trials may share a job if `limit` cells may.

        One with a pruner, which ends single trials, or if memory is an objective: for several networks it is unknown.
        """
        spec = self.search.spec
        return limit if spec.pruner is None and "memory" not in spec.objectives else 1


class Scheduler:
    """Executes cells and searches on one launcher. Several schedulers may share cells and searches, by means of locks.

    `on_change` is called with every cell or search that started or ended, and with None every `POLL_SECONDS`.
    """

    def __init__(
        self,
        launcher: Launcher,
        options: ExecutionOptions,
        resolve: Resolver,
        cells: Iterable[PlannedCell],
        tasks: Iterable[SearchTask],
        on_change: OnChange = lambda changed: None,
        open_searches: OpenSearches = lambda planned: [],
    ):
        """`open_searches`: opens the searches that can only start when another one has ended."""
        self._launcher = launcher
        self._options = _for_jobs(options)
        self._store = RunStore(options.runs)
        self._resolve = resolve
        self._cells = deque(cell for cell in cells if _is_ready(cell))
        self._tasks = list(tasks)
        self._on_change = on_change
        self._open_searches = open_searches
        self._in_flight: dict[str, list[PlannedCell] | SearchTask] = {}
        self._elsewhere: list[tuple[PlannedCell, float]] = []
        """Cells that other processes execute, with the time when that was noticed."""
        self._interruptions: dict[str, int] = {}
        self._polled = 0.0
        self._warned = False
        self._mirror = Mirror(options.runs, options.tracking, warn)

    def run(self) -> None:
        """Run until every cell and search has ended. Ctrl-C is raised; the launcher still has its jobs then."""
        try:
            self._execute_all()
        except KeyboardInterrupt:
            for task in self._tasks:
                self._mirror.update_search(task.search.folder.path, final=True, stopped=self._in_flight)
            raise

    def _execute_all(self) -> None:
        while self._in_flight or self._cells or self._elsewhere or self._tasks:
            submitted = self._submit()
            if not submitted and not self._in_flight:
                time.sleep(0.2)  # other processes execute all remaining cells
            for result in self._launcher.wait(0.5 if self._in_flight else 0):
                self._take(result)
            if time.monotonic() - self._polled > POLL_SECONDS:
                self._poll()
                self._polled = time.monotonic()
            for task in [task for task in self._tasks if task.search.finished and not self._trials_in_flight(task)]:
                self._finish(task)

    # ---- what to execute next ----------------------------------------------------------------------------------------

    def _submit(self) -> bool:
        submitted = False
        while self._launcher.free > 0:
            job = self._next_job()
            if job is None:
                break
            self._launcher.submit(job)
            submitted = True
        return submitted

    def _next_job(self) -> Job | None:
        """The next job. Cells go before trials, as each completes a row of the table; cells that may share a job wait
        for others to join, as long as there are trials to start.
        """
        limit = self._cells_per_job()
        if self._options.together == 1:
            return self._job_of_cells(limit) or self._job_of_trials(limit)
        return self._job_of_trials(limit) or self._job_of_cells(limit)

    def _cells_per_job(self) -> int:
        """How many cells the next job may have, so that every slot gets a job."""
        if self._options.together == 1:
            return 1
        ready = len(self._cells) + sum(self._trials_that_fit(task) for task in self._tasks)
        per_free_slot = math.ceil(ready / self._launcher.free)
        per_slot = math.ceil((ready + len(self._in_flight)) / self._launcher.slots)
        return max(1, min(self._options.together, per_free_slot, per_slot))

    def _job_of_cells(self, limit: int) -> Job | None:
        cells = self._next_cells(limit)
        if not cells:
            return None
        return self._job(_data_key(cells[0]), [JobCell(cell.request, cell.fingerprint or "") for cell in cells])

    def _job_of_trials(self, limit: int) -> Job | None:
        for task in self._tasks:
            if trials := self._next_trials(task, limit):
                data_key = task.data_key._replace(seed=trials[0].request.seed)
                return self._job(data_key, [JobCell(trial.request, trial.fingerprint) for trial in trials])
        return None

    def _next_cells(self, limit: int) -> list[PlannedCell]:
        """The first cell that can start and, up to `limit`, others with the same data; the rest keep their order."""
        taken: list[PlannedCell] = []
        for _ in range(len(self._cells)):
            cell = self._cells.popleft()
            assert cell.fingerprint is not None
            running = self._in_flight.get(cell.fingerprint)
            if isinstance(running, list):  # another row of the study resolves to the same run
                running.append(cell)
            elif running is not None or len(taken) == limit or not self._may_share_a_job(cell, taken):
                self._cells.append(cell)
            else:
                taken.append(cell)
                self._in_flight[cell.fingerprint] = [cell]
                cell.state, cell.reason = RunState.RUNNING, None
                self._on_change(cell)
        return taken

    def _may_share_a_job(self, cell: PlannedCell, others: list[PlannedCell]) -> bool:
        return not others or (
            _data_key(cell) == _data_key(others[0])
            and not any(self._is_last_attempt(one.fingerprint) for one in (cell, others[0]))
        )

    def _is_last_attempt(self, fingerprint: str | None) -> bool:
        """Whether a run was interrupted repeatedly: it then runs alone, as it may be the reason why its jobs die."""
        return self._interruptions.get(fingerprint or "", 0) >= RESUMES

    def _next_trials(self, task: SearchTask, limit: int) -> list[TrialJob]:
        """Up to `limit` trials of a search that can start now."""
        trials: list[TrialJob] = []
        while len(trials) < task.trials_per_job(limit) and self._trials_that_fit(task):
            trial = task.search.next(trials[0].request.seed if trials else None)
            if trial is None:
                break
            if trial.fingerprint in self._in_flight:  # of another search, with the same hyperparameters
                task.search.ended(trial.fingerprint, Outcome(RunState.RUNNING))
                break
            self._in_flight[trial.fingerprint] = task
            trials.append(trial)
            if self._is_last_attempt(trial.fingerprint):
                break
        if trials:
            self._on_change(task)
        return trials

    def _trials_that_fit(self, task: SearchTask) -> int:
        """How many more trials of a search may be started, as far as is known."""
        jobs = max(task.jobs, self._launcher.slots) if task.search.spec.is_fixed_in_advance else task.jobs
        most = jobs * task.trials_per_job(self._options.together)
        return max(0, min(most, task.search.left) - self._trials_in_flight(task))

    def _trials_in_flight(self, task: SearchTask) -> int:
        return sum(1 for running in self._in_flight.values() if running is task)

    def _job(self, data_key: SharedDataKey, cells: list[JobCell]) -> Job:
        """The job of these cells, which are marked as in flight."""
        return Job(tuple(cells), self._options, self._expected_reuses(data_key))

    def _expected_reuses(self, data_key: SharedDataKey) -> int:
        """The number of pending runs on the same data, including those that wait for their searches."""
        count = sum(_data_key(cell) == data_key for cell in self._cells)
        for task in self._tasks:
            of_trials = task.data_key
            if data_key.seed in task.search.spec.seeds and of_trials._replace(seed=data_key.seed) == data_key:
                count += max(0, task.search.left - self._trials_in_flight(task))
                count += sum(row.trials for planned in task.planned for row in planned.rows)
            requests = (
                cell.request
                for planned in task.planned
                for row in (planned, *planned.rows)
                for cell in row.cells
                if cell.state is RunState.WAITING
            )  # fmt: skip
            count += sum(
                of_trials._replace(seed=request.seed, part=request.part) == data_key for request in requests
            )  # fmt: skip
        return count

    # ---- results -----------------------------------------------------------------------------------------------------

    def _take(self, result: JobResult) -> None:
        fingerprint, outcome = result.cell.fingerprint, result.outcome
        running = self._in_flight.pop(fingerprint)
        if result.warning is not None and not self._warned:  # every process has the same one
            self._warned = True
            warn(result.warning)
        resumes = outcome.state is RunState.INTERRUPTED and self._may_resume(fingerprint)
        if isinstance(running, SearchTask):
            if outcome.state is RunState.INTERRUPTED and not resumes:
                outcome = replace(outcome, state=RunState.FAILED)
            running.search.ended(fingerprint, outcome)
            self._mirror.update_search(running.search.folder.path)
            self._on_change(running)
            return
        for cell in running:
            if outcome.state is RunState.RUNNING:
                cell.state, cell.reason = RunState.RUNNING, f"executed by {outcome.reason}"
                self._elsewhere.append((cell, time.monotonic()))
            elif resumes:
                self._cells.append(cell)
            else:
                refresh(cell, self._store)
                if outcome.state is not RunState.DONE:  # the folder may not have been writable
                    cell.state, cell.reason = outcome.state, outcome.reason
            self._on_change(cell)

    def _may_resume(self, fingerprint: str) -> bool:
        self._interruptions[fingerprint] = self._interruptions.get(fingerprint, 0) + 1
        return self._interruptions[fingerprint] <= RESUMES

    def _poll(self) -> None:
        for cell, since in list(self._elsewhere):
            assert cell.spec is not None
            unlocked = self._store.lock_owner(self._store.folder(cell.spec)) is None
            # Only the lease of an owner on another machine is visible; a job watches it and takes over if it expires.
            if unlocked or time.monotonic() - since > lease_seconds():
                self._elsewhere.remove((cell, since))
                refresh(cell, self._store)
                if not (cell.state.final or cell.state.failed):
                    self._cells.append(cell)
                self._on_change(cell)
        for task in self._tasks:
            for fingerprint in task.search.poll():
                if self._in_flight.get(fingerprint) is task:
                    self._launcher.stop(fingerprint)
        self._on_change(None)

    def _finish(self, task: SearchTask) -> None:
        self._tasks.remove(task)
        task.conclusion = task.search.conclude()
        self._mirror.update_search(task.search.folder.path, final=True)
        settled = [row for planned in task.planned for row in settle(planned, self._resolve, self._store)]
        self._cells += [cell for row in settled for cell in row.cells if _is_ready(cell)]
        self._tasks += self._open_searches([row for row in settled if not row.finished])
        self._on_change(task)


def _for_jobs(options: ExecutionOptions) -> ExecutionOptions:
    """With paths that hold in any working directory, and the plugin files that this process has loaded."""
    return replace(
        options, runs=options.runs.absolute(), data=options.data.absolute(), plugins=tuple(loaded_files())
    )  # fmt: skip


def _is_ready(cell: PlannedCell) -> bool:
    return cell.spec is not None and not cell.state.final and cell.state is not RunState.WAITING


def _data_key(cell: PlannedCell) -> SharedDataKey:
    assert cell.spec is not None
    return SharedDataKey.of(cell.spec)
