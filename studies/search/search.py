"""One search: an Optuna study that proposes trials and records their outcomes; the scheduler executes them.

A trial is stored in one write: number, hyperparameters and the run's fingerprint together. A proposal depends only on
the seed, the trial's number and the trials before it, so that a search that is killed and resumed makes the same trials
as an uninterrupted one; with several workers it also depends on which trials have ended.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from harness.cells.resolve import Request, Resolver
from harness.errors import UserError
from harness.runs import locks
from harness.runs.folder import RunFolder
from harness.runs.locks import AlreadyLocked, LockLost, RunLock
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.util.files import sqlite_url
from harness.util.text import innermost_reason, safe_url
from studies.search import optuna_storage
from studies.search.samplers import (
    PRUNER_RECORD,
    PrunerRecord,
    check_sampler,
    directions,
    propose,
    quiet_optuna,
    replay,
)
from studies.search.sharing import LockWatch, Outage, exclusive
from studies.search.spec import Range, SearchFolder, SearchSpec, Trial, TrialState
from studies.search.stored import (
    FINGERPRINT,
    OTHERS,
    REASON,
    STEPS,
    WORKER,
    as_trial,
    mean_objectives,
    runs_of,
)
from studies.search.summary import Conclusion, conclude

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

T = TypeVar("T")

_TURN_SECONDS = 1.0
"""Seconds that a call waits for the lock of the search before it gives up for now."""
_LONG_WAIT = 30.0
"""Seconds of waiting for the lock after which a warning names its owner."""


@dataclass(frozen=True)
class TrialJob:
    """One run of a trial to execute."""

    number: int
    request: Request
    fingerprint: str


class Search:
    """Proposes trials until there are `trials` of them; any number of processes may share the run store.

    Never executes anything and never blocks for long: while the storage does not answer or another worker holds the
    lock, nothing is proposed and outcomes are recorded later. After `patience` seconds it raises `UserError`.
    """

    def __init__(
        self,
        request: Request,
        space: dict[str, Range],
        trials: int,
        store: RunStore,
        resolve: Resolver,
        *,
        sampler: str = "tpe",
        pruner: str | None = None,
        objectives: tuple[str, ...] = ("miou",),
        seeds: tuple[int, ...] = (),
        storage: str | None = None,
        warn: Callable[[str], None],
        patience: float = 600,
    ):
        """`request` is a cell on the dev split with the hyperparameters that are not searched; a trial is one run for
        each of the `seeds`, by default the request's own.

        `storage`: an Optuna URL, `journal:PATH`, or None for SQLite in the run store. Raises `UserError`.
        """
        if trials < 1:
            raise UserError(f"--trials {trials}: use at least 1")
        self.spec = SearchSpec.of(resolve(request), space, sampler, pruner, objectives, seeds)
        check_sampler(sampler, space, trials, len(objectives))
        self.folder = SearchFolder.under(store.root, self.spec)
        self.folder.begin()
        self._request, self._store, self._resolve = request, store, resolve
        self._number_of_trials = trials
        self._patience = patience
        self._locks = store.root / ".locks"
        self._owners = LockWatch(self._locks)
        self._worker = f"worker-{uuid.uuid4().hex[:16]}"
        self._resources = contextlib.ExitStack()
        self._assigned: dict[str, int] = {}
        """Fingerprint -> number of the trials that `next` returned and that have not ended."""
        self._unrecorded: list[tuple[int, Outcome]] = []
        self._storage_outage = Outage("start it", patience, warn)
        self._turn_outage = Outage("stop that process", patience, warn, warn_after=_LONG_WAIT)
        self._turn: RunLock | None = None
        self._url = storage or sqlite_url(store.root / "optuna.db")
        with quiet_optuna():
            self._storage, self._study = self._open()
        # This lock shows other workers that this one is alive.
        self._resources.enter_context(locks.lock(self._locks, self._worker))
        self.trials: list[Trial] = self.folder.trials()
        """The trials as last read."""
        self._when_possible(self._refresh)

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release unfinished trials to other workers, as happens when the process dies."""
        self._resources.close()
        (self._locks / self._worker).unlink(missing_ok=True)

    @property
    def finished(self) -> bool:
        """Whether all trials have ended, including those of other workers."""
        return not self.left and not self._unrecorded

    @property
    def left(self) -> int:
        """How many trials have not ended, including those that are not proposed yet; as last read."""
        trials = self.trials[: self._number_of_trials]
        return self._number_of_trials - sum(trial.state is not TrialState.RUNNING for trial in trials)

    def next(self, seed: int | None = None) -> TrialJob | None:
        """A run to execute now: of a trial whose worker died or that has seeds left, else of a new one. None: nothing.

        `seed`: only a run of this seed.
        """
        found: TrialJob | bool | None = self._when_possible(self._has_work, exclusively=False)
        while found is True:
            found = self._when_possible(lambda: self._next_in_turn(seed))
        return found or None

    def ended(self, fingerprint: str, outcome: Outcome) -> None:
        """Record the outcome of a trial that `next` returned; `running` if another process executes it."""
        number = self._assigned.pop(fingerprint)
        if outcome.state is RunState.RUNNING:
            self._owners.forget(fingerprint)
        self._unrecorded.append((number, outcome))
        self._when_possible(self._refresh)

    def poll(self) -> list[str]:
        """Update `trials` and the folder; returns the fingerprints of assigned trials that the pruner ends.

        The pruner uses the mIoU of the training crops, from the runs' curves: the dev split is only evaluated at the
        end.
        """
        if bool(self._unrecorded) or self._when_possible(self._is_behind, exclusively=False):
            self._when_possible(self._refresh)
        if self.spec.pruner is None or not self._assigned:
            return []
        return self._when_possible(self._pruned) or []

    def conclude(self) -> Conclusion:
        """Write the best trials, importances and plots into the search's folder."""
        self._when_possible(self._refresh)
        return conclude(self.folder, self._request, self._number_of_trials)

    # ---- the storage -------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[BaseStorage, Study]:
        """Open the storage. Raises `UserError` immediately if it cannot be used, not after `patience`."""
        import optuna

        try:
            # Concurrent creations of the schema fail.
            with exclusive(self._locks, "optuna", self._patience):
                storage = optuna_storage.open_storage(self._url)
                return storage, optuna.create_study(
                    storage=storage,
                    study_name=self.spec.name,
                    load_if_exists=True,
                    directions=directions(self.spec),
                    sampler=optuna.samplers.RandomSampler(),  # draws nothing: see `propose`
                )
        except AlreadyLocked as error:
            raise UserError(f"{self._locks / 'optuna'}: held by {error.lock_owner}; stop that process") from error
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--storage {safe_url(self._url)}: cannot be used ({innermost_reason(error, self._url)}); use an "
                "SQLAlchemy URL such as postgresql+psycopg://USER@HOST/DATABASE, or journal:PATH"
            ) from error

    def _when_possible(self, work: Callable[[], T], *, exclusively: bool = True) -> T | None:
        """`work()`, or None if it is not possible now.

        `exclusively`: under the lock, after the outcomes of ended trials were recorded.
        """
        if self._storage_outage.pausing:
            return None
        try:
            with quiet_optuna(), contextlib.ExitStack() as stack:
                if exclusively:
                    self._turn = stack.enter_context(exclusive(self._locks, self.spec.name, _TURN_SECONDS))
                    while self._unrecorded:
                        self._record_end(*self._unrecorded[0])
                        self._unrecorded.pop(0)
                result = work()
        except (AlreadyLocked, LockLost) as error:
            owner = error.lock_owner if isinstance(error, AlreadyLocked) else "another machine"
            self._turn_outage.go_on(f"search {self.spec.name}: locked by {owner}")
        except UserError:
            raise
        except Exception as error:
            if not optuna_storage.is_away(error):
                raise
            reason = innermost_reason(error, self._url)
            self._storage_outage.go_on(f"--storage {safe_url(self._url)}: does not answer ({reason})")
        else:
            self._storage_outage.end()
            if exclusively:
                self._turn_outage.end()
            return result
        return None

    def _load(self) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False)
        if any(not {FINGERPRINT, OTHERS} <= set(trial.user_attrs) for trial in trials):
            raise UserError(
                f"--storage {safe_url(self._url)}: study {self.spec.name} has trials that this program did not make; "
                "use another storage"
            )
        return trials

    def _is_behind(self) -> bool:
        self.trials = [as_trial(trial) for trial in self._load()]
        return self.folder.trials() != self.trials

    def _refresh(self) -> None:
        if self._is_behind():
            self.folder.write(self.trials)

    def _set_attribute(self, number: int, key: str, value: Any) -> None:
        study = self._storage.get_study_id_from_name(self.spec.name)
        trial = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        self._storage.set_trial_user_attr(trial, key, value)

    # ---- under the lock of the search --------------------------------------------------------------------------------

    def _has_work(self) -> bool:
        """Whether there may be something to do. Usually there is not, and checking it does not need the lock."""
        trials = self._load()[: self._number_of_trials]
        return (
            bool(self._unrecorded)
            or len(trials) < self._number_of_trials
            or any(trial.state.name == "RUNNING" and self._is_free(trial) for trial in trials)
        )

    def _next_in_turn(self, seed: int | None) -> TrialJob | bool:
        """A run to execute; True: something was recorded or proposed, call again; False: nothing now."""
        trials = self._load()
        for trial in trials[: self._number_of_trials]:
            if trial.state.name == "RUNNING" and self._is_free(trial) and (found := self._assign(trial, seed)):
                return found
        if len(trials) < self._number_of_trials and seed in (None, self.spec.seed):
            self._propose(trials)
            return True
        self._refresh()
        return False

    def _is_free(self, trial: FrozenTrial) -> bool:
        """Whether no worker executes the trial or is about to."""
        fingerprints, worker = runs_of(trial), trial.user_attrs[WORKER]
        if not self._assigned.keys().isdisjoint(
            fingerprints
        ):  # possibly by another trial with the same hyperparameters
            return False
        return (worker == self._worker or self._owners.is_free(worker)) and all(map(self._owners.is_free, fingerprints))

    def _assign(self, trial: FrozenTrial, wanted: int | None) -> TrialJob | bool:
        """As for `_next_in_turn`. The runs of a trial are executed one after another, in the order of the seeds."""
        for seed, fingerprint in zip(self.spec.seeds, runs_of(trial), strict=True):
            if self._store.outcome(self._run(fingerprint)).state is RunState.DONE:
                continue
            if wanted not in (None, seed):
                return False
            if trial.user_attrs[WORKER] != self._worker:
                self._set_attribute(trial.number, WORKER, self._worker)
            self._assigned[fingerprint] = trial.number
            return TrialJob(trial.number, self._request_of(trial.params, seed), fingerprint)
        self._record_end(trial.number, Outcome(RunState.DONE))
        return True

    def _propose(self, trials: list[FrozenTrial]) -> None:
        """Store the next trial with its runs' fingerprints in one write."""
        trial = propose(self.spec, trials)
        fingerprint, *others = (
            self._resolve(self._request_of(trial.params, seed)).spec.fingerprint for seed in self.spec.seeds
        )
        trial.user_attrs = {FINGERPRINT: fingerprint, OTHERS: others, WORKER: self._worker}
        assert self._turn is not None
        self._turn.check()
        self._study.add_trial(trial)

    def _record_end(self, number: int, outcome: Outcome) -> None:
        """Record an outcome in the storage. May be repeated; a trial that will be resumed is not recorded."""
        from optuna.trial import TrialState as OptunaState

        trials = self._load()
        fingerprint = trials[number].user_attrs[FINGERPRINT]
        if trials[number].state.is_finished():
            return
        runs = [self._run(one) for one in runs_of(trials[number])]
        found = [self._store.read(run) for run in runs]
        results = [result for _, result in found]
        values: list[float] | None = None
        reason: str | None = None
        if pruned_at := self._pruned_at(trials, number):
            state, reason = TrialState.PRUNED, f"pruned by search {self.spec.name} at step {pruned_at}"
            if results[0] is None:
                self._write_reason(runs[0], reason)
        elif None not in results:
            state, values = TrialState.COMPLETE, mean_objectives(self.spec, [result for result in results if result])
            if values is None:
                state, reason = TrialState.FAILED, f"its result has no value for {' or '.join(self.spec.objectives)}"
        elif outcome.state in (RunState.INTERRUPTED, RunState.RUNNING, RunState.DONE):  # done, but damaged since
            return
        else:
            state, reason = TrialState.FAILED, str(outcome)
        steps = sum(one.step or 0 for one, _ in found)
        twin = next((t.number for t in trials[:number] if t.user_attrs[FINGERPRINT] == fingerprint), None)
        if twin is not None:
            steps, reason = 0, reason or f"the same hyperparameters as trial {twin}"
        self._set_attribute(number, STEPS, steps)
        self._set_attribute(number, REASON, reason)
        self._study.tell(number, values, OptunaState[state.optuna])

    def _pruned(self) -> list[str]:
        trials = self._load()
        return [fingerprint for fingerprint, number in self._assigned.items() if self._pruned_at(trials, number)]

    def _pruned_at(self, trials: list[FrozenTrial], number: int) -> int | None:
        """The step at which the pruner ends the trial.

        The curve decides, not the clock: a trial that ended before the check is pruned as well.
        """
        if self.spec.pruner is None:
            return None
        trial = trials[number]
        record: PrunerRecord | None = trial.user_attrs.get(PRUNER_RECORD)
        curve = [
            (point["step"], point["miou_train"])
            for point in self._run(trial.user_attrs[FINGERPRINT]).curve()
            if point["miou_train"] is not None and point["step"] < self.spec.budget.steps
        ]
        if record is None or (record["pruned_at"] is None and len(record["curve"]) < len(curve)):
            record = replay(self.spec, trials, number, curve)
            self._set_attribute(number, PRUNER_RECORD, record)
        return record["pruned_at"]

    # ---- runs --------------------------------------------------------------------------------------------------------

    def _write_reason(self, run: RunFolder, reason: str) -> None:
        """Write the reason why a run was stopped to its folder."""
        with contextlib.suppress(AlreadyLocked), self._store.lock(run) as run.lock:
            run.finish(Outcome(RunState.INTERRUPTED, reason))

    def _run(self, fingerprint: str) -> RunFolder:
        return self._store.by_fingerprint(fingerprint)

    def _request_of(self, params: dict[str, Any], seed: int) -> Request:
        return replace(self._request, settings={**self._request.settings, **params}, seed=seed)
