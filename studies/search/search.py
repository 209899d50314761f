"""One search: an Optuna study that is driven from outside. It says what to execute and is told what came of it.

A trial enters the storage whole, in one write: number, hyperparameters and the run's fingerprint together. What is
proposed depends on the seed, the trial's number and the trials before it alone, so that a search that is killed and
gone on with makes the same trials as one that is not; with several workers also on which trials had ended by then.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from harness.cells.resolve import Request, Resolver
from harness.errors import UserError
from harness.runs import locks
from harness.runs.folder import RunFolder
from harness.runs.locks import AlreadyLocked, LockLost, RunLock
from harness.runs.result import RunResult
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from studies.search import optuna_storage as optuna_storage
from studies.search.samplers import WATCHED, Watched, check_sampler, directions, propose, quiet_optuna, watch
from studies.search.spec import OBJECTIVES, Range, SearchFolder, SearchSpec, Trial, TrialState
from studies.search.summary import Conclusion, conclude

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

T = TypeVar("T")

FINGERPRINT, WORKER = "fingerprint", "worker"
"""User attributes of a trial in Optuna's storage: its run, and the worker that sees to it."""
SPENT, REASON = "steps", "reason"
"""User attributes of a trial that has ended."""
STATES: dict[str, TrialState] = {"RUNNING": "running", "COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}

_TURN = 1.0
"""Seconds that a call waits for another worker's turn before it says "nothing now"."""
_LONG_TURN = 30.0
"""Seconds without a turn after which it is said who has it."""
_RETRY = 1.0
"""Seconds between two tries of a storage that does not answer."""


@dataclass(frozen=True)
class TrialJob:
    """A trial to execute."""

    number: int
    request: Request
    fingerprint: str


class Search:
    """Proposes trials until `trials` of them are made, by however many processes that share the run store.

    Never executes anything and never waits long: where the storage does not answer, or another worker has its turn,
    there is nothing to do now, and what has to be told is remembered. After `patience` seconds of that: `UserError`.
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
        storage: str | None = None,
        warn: Callable[[str], None],
        patience: float = 600,
    ):
        """`request` is a cell of the dev part with the hyperparameters that are not searched.

        `storage`: an Optuna URL, `journal:PATH`, or None for SQLite in the run store. Raises `UserError`.
        """
        if trials < 1:
            raise UserError(f"--trials {trials}: give at least 1")
        self.spec = SearchSpec.of(resolve(request), space, sampler, pruner, objectives)
        check_sampler(self.spec, trials)
        self.folder = SearchFolder.under(store.root, self.spec)
        self.folder.begin()
        self._request, self._store, self._resolve = request, store, resolve
        self._number_of_trials = trials
        self._warn, self._patience = warn, patience
        self._locks = store.root / ".locks"
        self._worker = f"worker-{uuid.uuid4().hex[:16]}"
        self._held = contextlib.ExitStack()
        self._mine: dict[str, int] = {}
        """Fingerprint -> number of the trials that were handed out and have not ended."""
        self._untold: list[tuple[int, Outcome]] = []
        self._beats: dict[str, tuple[bytes, float]] = {}
        self._troubles: dict[str, _Trouble] = {}
        self._turn: RunLock | None = None
        url = storage or f"sqlite:///{(store.root / 'optuna.db').absolute()}"
        self._shown = optuna_storage.without_password(url)
        with quiet_optuna():
            self._storage, self._study = self._open(url)
        self._held.enter_context(locks.lock(self._locks, self._worker))  # by it others see that this worker lives
        self.trials: list[Trial] = self.folder.trials()
        """As last seen."""
        self._when_possible(self._refresh)

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave what was handed out to other workers. A process that ends without it is seen to have ended."""
        self._held.close()
        (self._locks / self._worker).unlink(missing_ok=True)

    @property
    def finished(self) -> bool:
        """Whether all trials have ended, whoever executed them."""
        return not self.left and not self._untold

    @property
    def left(self) -> int:
        """How many trials have not ended, those that are not made yet among them; as last seen."""
        ended = [trial for trial in self.trials[: self._number_of_trials] if trial.state != "running"]
        return self._number_of_trials - len(ended)

    def next(self) -> TrialJob | None:
        """A trial to execute now: one that nobody executes any more, else a new one. None: nothing now."""
        found: TrialJob | bool | None = self._when_possible(self._look, alone=False)
        while found is True:
            found = self._when_possible(self._step)
        return found or None

    def ended(self, fingerprint: str, outcome: Outcome) -> None:
        """How a trial ended that `next` handed out; `running` where another process executes it."""
        number = self._mine.pop(fingerprint)
        if outcome.state is RunState.RUNNING:
            self._beats.pop(fingerprint, None)  # whoever executes it gets the whole time of a lease again
        self._untold.append((number, outcome))
        self._when_possible(self._refresh)

    def poll(self) -> list[str]:
        """Bring `trials` and the folder up to date; the fingerprints of handed out trials that are to be stopped.

        The pruner sees the mIoU of the training crops, from the runs' curves: the dev part is evaluated at the end
        alone.
        """
        if self._untold or self._when_possible(self._is_behind, alone=False):
            self._when_possible(self._refresh)
        if self.spec.pruner is None or not self._mine:
            return []
        return self._when_possible(self._pruned) or []

    def conclude(self) -> Conclusion:
        """Write what was found into the search's folder."""
        self._when_possible(self._refresh)
        return conclude(self.folder, self._request, self._number_of_trials)

    # ---- the storage -------------------------------------------------------------------------------------------------

    def _open(self, url: str) -> tuple[BaseStorage, Study]:
        """Raises `UserError` for a storage that cannot be used: at once, and not after `patience`."""
        import optuna

        try:
            with self._alone("optuna", self._patience):  # processes that make a schema at once make each other fail
                storage = optuna_storage.open_storage(url)
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
                f"--storage {self._shown}: cannot be used ({optuna_storage.reason(error)}); give an SQLAlchemy URL "
                "such as postgresql+psycopg://USER@HOST/DATABASE, or journal:PATH"
            ) from error

    @contextlib.contextmanager
    def _alone(self, name: str, seconds: float) -> Iterator[RunLock]:
        """Hold a lock that all workers know. Raises `AlreadyLocked` where that takes longer than `seconds`."""
        with contextlib.ExitStack() as held:
            end = time.monotonic() + seconds
            while True:
                try:
                    claim = held.enter_context(locks.lock(self._locks, name))
                    break
                except AlreadyLocked:
                    if time.monotonic() > end:
                        raise
                    time.sleep(random.uniform(0.01, 0.05))
            yield claim

    def _when_possible(self, work: Callable[[], T], *, alone: bool = True) -> T | None:
        """`work()`, or None where that cannot be now. In this worker's turn it is, after what there was to tell."""
        away = self._troubles.get("storage")
        if away and time.monotonic() < away.retry:
            return None
        try:
            with quiet_optuna(), contextlib.ExitStack() as held:
                if alone:
                    self._turn = held.enter_context(self._alone(self.spec.name, _TURN))
                    while self._untold:
                        self._tell(*self._untold[0])
                        self._untold.pop(0)
                result = work()
        except (AlreadyLocked, LockLost) as error:
            lock_owner = error.lock_owner if isinstance(error, AlreadyLocked) else "another machine"
            self._put_off("turn", f"search {self.spec.name}: its turn is held by {lock_owner}", "stop that process")
        except UserError:
            raise
        except Exception as error:
            if not optuna_storage.is_away(error):
                raise
            problem = f"--storage {self._shown}: does not answer ({optuna_storage.reason(error)})"
            self._put_off("storage", problem, "start it")
        else:
            self._troubles.pop("storage", None)
            if alone:
                self._troubles.pop("turn", None)
            return result
        return None

    def _put_off(self, kind: Literal["storage", "turn"], problem: str, remedy: str) -> None:
        """Warn once. Raises `UserError` after the search's patience."""
        now = time.monotonic()
        trouble = self._troubles.setdefault(kind, _Trouble(since=now))
        trouble.retry = now + _RETRY
        if now - trouble.since > self._patience:
            raise UserError(f"{problem}, for {self._patience:g} s; {remedy} and repeat the command, the search goes on")
        if not trouble.warned and (kind == "storage" or now - trouble.since > _LONG_TURN):
            trouble.warned = True
            self._warn(f"{problem}; what is executed goes on, and it is tried again for {self._patience:g} s")

    def _load(self) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False)
        if any(FINGERPRINT not in trial.user_attrs for trial in trials):
            raise UserError(
                f"--storage {self._shown}: study {self.spec.name} has trials that were not made here; give another"
            )
        return trials

    def _is_behind(self) -> bool:
        self.trials = [_record(trial) for trial in self._load()]
        return self.folder.trials() != self.trials

    def _refresh(self) -> None:
        if self._is_behind():
            self.folder.write(self.trials)

    # ---- one turn ----------------------------------------------------------------------------------------------------

    def _look(self) -> bool:
        """Whether there may be something to do; most often there is not, and nobody's turn is needed to see that."""
        trials = self._load()[: self._number_of_trials]
        return (
            bool(self._untold)
            or len(trials) < self._number_of_trials
            or any(trial.state.name == "RUNNING" and self._is_free(trial) for trial in trials)
        )

    def _step(self) -> TrialJob | bool:
        """A trial to execute; True: something was done, look again; False: nothing now."""
        trials = self._load()
        for trial in trials[: self._number_of_trials]:
            if trial.state.name == "RUNNING" and self._is_free(trial):
                return self._take(trial)
        if len(trials) < self._number_of_trials:
            self._propose(trials)
            return True
        self._refresh()
        return False

    def _is_free(self, trial: FrozenTrial) -> bool:
        """Whether the trial is not executed, and nobody is about to."""
        fingerprint, worker = trial.user_attrs[FINGERPRINT], trial.user_attrs[WORKER]
        if fingerprint in self._mine:  # by another trial of the same hyperparameters, maybe
            return False
        return (worker == self._worker or self._is_gone(worker)) and self._is_gone(fingerprint)

    def _is_gone(self, claim: str) -> bool:
        """Whether the claim's holder is: at once where it was on this machine, else when no beat came for a lease."""
        if locks.lock_owner(self._locks, claim) is None:
            return True
        try:
            beat = (self._locks / f"{claim}.lease").read_bytes()
        except FileNotFoundError:
            beat = b""
        now = time.monotonic()
        seen, since = self._beats.setdefault(claim, (beat, now))
        if beat != seen:
            self._beats[claim] = beat, now
            return False
        return now - since > locks.LEASE

    def _take(self, trial: FrozenTrial) -> TrialJob | bool:
        fingerprint = trial.user_attrs[FINGERPRINT]
        if self._run(fingerprint).result() is not None:
            self._tell(trial.number, Outcome(RunState.DONE))
            return True
        if trial.user_attrs[WORKER] != self._worker:
            self._note(trial.number, WORKER, self._worker)
        self._mine[fingerprint] = trial.number
        return TrialJob(trial.number, self._request_of(trial.params), fingerprint)

    def _propose(self, trials: list[FrozenTrial]) -> None:
        """Store the next trial with its run's fingerprint in one write."""
        trial = propose(self.spec, trials)
        fingerprint = self._resolve(self._request_of(trial.params)).spec.fingerprint
        trial.user_attrs = {FINGERPRINT: fingerprint, WORKER: self._worker}
        assert self._turn is not None
        self._turn.check()
        self._study.add_trial(trial)

    def _pruned(self) -> list[str]:
        trials = self._load()
        return [fingerprint for fingerprint, number in self._mine.items() if self._pruned_at(trials, number)]

    def _tell(self, number: int, outcome: Outcome) -> None:
        """Repeated without harm; nothing is told of a trial that is to be gone on with."""
        from optuna.trial import TrialState as State

        trials = self._load()
        fingerprint = trials[number].user_attrs[FINGERPRINT]
        if trials[number].state.is_finished():
            return
        run = self._run(fingerprint)
        result, status = run.result(), run.status()
        values: list[float] | None = None
        reason: str | None = None
        if pruned_at := self._pruned_at(trials, number):
            state, reason = State.PRUNED, f"pruned by search {self.spec.name} at step {pruned_at}"
            if result is None:
                self._explain(run, reason)
        elif result is not None:
            state, reason, values = State.COMPLETE, None, self._figures(result)
            if values is None:
                state, reason = State.FAIL, f"its result has no figure for {' or '.join(self.spec.objectives)}"
        elif outcome.state in (
            RunState.INTERRUPTED,
            RunState.RUNNING,
            RunState.DONE,
        ):  # done, and its result was damaged since
            return
        else:
            state, reason = State.FAIL, str(outcome)
        spent = result.steps if result else status.step if status else 0
        twin = next((t.number for t in trials[:number] if t.user_attrs[FINGERPRINT] == fingerprint), None)
        if twin is not None:
            spent, reason = 0, reason or f"the same hyperparameters as trial {twin}"
        self._note(number, SPENT, spent)
        self._note(number, REASON, reason)
        self._study.tell(number, values, state)

    def _figures(self, result: RunResult) -> list[float] | None:
        """One an objective; None where one is not defined."""
        found = [OBJECTIVES[name].of(result) for name in self.spec.objectives]
        figures = [figure for figure in found if figure is not None and math.isfinite(figure)]
        return figures if len(figures) == len(found) else None

    def _pruned_at(self, trials: list[FrozenTrial], number: int) -> int | None:
        """The step at which the pruner ended the trial. The curve decides and not the clock: a trial that was quicker
        than whoever watched it is pruned all the same.
        """
        if self.spec.pruner is None:
            return None
        trial = trials[number]
        watched: Watched | None = trial.user_attrs.get(WATCHED)
        curve = [
            (point["step"], point["miou_train"])
            for point in self._run(trial.user_attrs[FINGERPRINT]).curve()
            if point["miou_train"] is not None and point["step"] < self.spec.budget.steps
        ]
        if watched is None or (watched["pruned_at"] is None and len(watched["curve"]) < len(curve)):
            watched = watch(self.spec, trials, number, curve)
            self._note(number, WATCHED, watched)
        return watched["pruned_at"]

    def _explain(self, run: RunFolder, reason: str) -> None:
        """In the folder of a run that was stopped before its end."""
        with contextlib.suppress(AlreadyLocked), self._store.lock(run) as run.lock:
            run.finish(Outcome(RunState.INTERRUPTED, reason))

    # ---- small change ------------------------------------------------------------------------------------------------

    def _note(self, number: int, key: str, value: Any) -> None:
        study = self._storage.get_study_id_from_name(self.spec.name)
        trial = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        self._storage.set_trial_user_attr(trial, key, value)

    def _run(self, fingerprint: str) -> RunFolder:
        return self._store.by_fingerprint(fingerprint)

    def _request_of(self, params: dict[str, Any]) -> Request:
        return replace(self._request, settings={**self._request.settings, **params})


@dataclass
class _Trouble:
    """Since when nothing could be done, on a monotonic clock."""

    since: float
    retry: float = 0.0
    warned: bool = False


def _record(trial: FrozenTrial) -> Trial:
    state = STATES[trial.state.name]
    return Trial(
        number=trial.number,
        state=state,
        settings=trial.params,
        fingerprint=trial.user_attrs[FINGERPRINT],
        values=trial.values if state == "complete" else None,
        steps=trial.user_attrs.get(SPENT, 0),
        reason=trial.user_attrs.get(REASON),
    )
