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
from typing import TYPE_CHECKING, Any, TypeVar

from harness import claims
from harness.cells import Request, Resolver
from harness.claims import Claim, Claimed, ClaimLost
from harness.errors import UserError
from harness.launch import Outcome
from harness.runs import RunFolder, RunStore
from studies import storage as storages
from studies.findings import Conclusion, conclude
from studies.sampling import check_sampler, directions, make_pruner, propose, quiet_optuna
from studies.searches import OBJECTIVES, Range, SearchFolder, SearchSpec, Trial, TrialState

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

T = TypeVar("T")

FINGERPRINT, WORKER, STEPS, REASON = "fingerprint", "worker", "steps", "reason"
"""What a trial carries in Optuna's storage as user attributes."""
STATES: dict[str, TrialState] = {"RUNNING": "running", "COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}

_TURN = 1.0
"""Seconds that a call waits for another worker's turn before it says "nothing now"."""
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
        self._untold: list[tuple[str, int, Outcome, str | None]] = []
        self._beats: dict[str, tuple[bytes, float]] = {}
        self._trouble: _Trouble | None = None
        self._turn: Claim | None = None
        url = storage or f"sqlite:///{(store.root / 'optuna.db').absolute()}"
        self._shown = storages.without_password(url)
        with quiet_optuna():
            self._storage, self._study = self._open(url)
        self._held.enter_context(claims.claim(self._locks, self._worker))  # by it others see that this worker lives
        self.trials: list[Trial] = self._when_possible(self._refresh) or self.folder.trials()
        """As last seen."""

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave what was handed out to other workers. A process that ends without it is seen to have ended."""
        self._held.close()

    @property
    def finished(self) -> bool:
        """Whether all trials have ended, whoever executed them."""
        ended = [trial for trial in self.trials[: self._number_of_trials] if trial.state != "running"]
        return len(ended) == self._number_of_trials and not self._untold

    def next(self) -> TrialJob | None:
        """A trial to execute now: one that nobody executes any more, else a new one. None: nothing now."""
        found: TrialJob | bool | None = True
        while found is True:
            found = self._when_possible(self._step)
        return found or None

    def ended(self, fingerprint: str, outcome: Outcome, reason: str | None) -> None:
        """What became of a trial that `next` handed out."""
        number = self._mine.pop(fingerprint)
        if outcome == "claimed":
            self._beats.pop(fingerprint, None)  # whoever executes it gets the whole time of a lease again
        self._untold.append((fingerprint, number, outcome, reason))
        self._when_possible(self._refresh)

    def poll(self) -> list[str]:
        """Bring `trials` and the folder up to date; the fingerprints of handed out trials that are to be stopped.

        The pruner sees the mIoU of the training crops, from the runs' curves: the dev part is evaluated at the end
        alone.
        """
        return self._when_possible(self._poll) or []

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
                storage = storages.open_storage(url)
                return storage, optuna.create_study(
                    storage=storage,
                    study_name=self.spec.name,
                    load_if_exists=True,
                    directions=directions(self.spec),
                    sampler=optuna.samplers.RandomSampler(),  # draws nothing: see `propose`
                    pruner=make_pruner(self.spec),
                )
        except Claimed as error:
            raise UserError(f"{self._locks / 'optuna'}: held by {error.holder}; stop that process") from error
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--storage {self._shown}: cannot be used ({storages.reason(error)}); give an SQLAlchemy URL such as "
                "postgresql+psycopg://USER@HOST/DATABASE, or journal:PATH"
            ) from error

    @contextlib.contextmanager
    def _alone(self, name: str, seconds: float) -> Iterator[Claim]:
        """Hold a lock that all workers know. Raises `Claimed` where that takes longer than `seconds`."""
        with contextlib.ExitStack() as held:
            end = time.monotonic() + seconds
            while True:
                try:
                    claim = held.enter_context(claims.claim(self._locks, name))
                    break
                except Claimed:
                    if time.monotonic() > end:
                        raise
                    time.sleep(random.uniform(0.01, 0.05))
            yield claim

    def _when_possible(self, work: Callable[[], T]) -> T | None:
        """`work()` in this worker's turn with what there was to tell told, or None where that cannot be now."""
        if self._trouble and time.monotonic() < self._trouble.retry:
            return None
        try:
            with quiet_optuna(), self._alone(self.spec.name, _TURN) as self._turn:
                while self._untold:
                    self._tell(*self._untold[0])
                    self._untold.pop(0)
                result = work()
        except (Claimed, ClaimLost) as error:
            holder = error.holder if isinstance(error, Claimed) else "another machine"
            self._put_off(f"search {self.spec.name}: its turn is held by {holder}", "stop that process", quiet=30)
        except UserError:
            raise
        except Exception as error:
            if not storages.is_away(error):
                raise
            problem = f"--storage {self._shown}: does not answer ({storages.reason(error)})"
            self._put_off(problem, "start it", quiet=0)
        else:
            self._trouble = None
            return result
        finally:
            self._turn = None
        return None

    def _put_off(self, problem: str, remedy: str, quiet: float) -> None:
        """Warn once, after `quiet` seconds. Raises `UserError` after the search's patience."""
        now = time.monotonic()
        trouble = self._trouble = self._trouble or _Trouble(since=now)
        trouble.retry = now + _RETRY
        if now - trouble.since > self._patience:
            raise UserError(f"{problem}, for {self._patience:g} s; {remedy} and repeat the command, the search goes on")
        if now - trouble.since >= quiet and not trouble.warned:
            trouble.warned = True
            self._warn(f"{problem}; what is executed goes on, and it is tried again for {self._patience:g} s")

    def _load(self) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False)
        if any(FINGERPRINT not in trial.user_attrs for trial in trials):
            raise UserError(
                f"--storage {self._shown}: study {self.spec.name} has trials that were not made here; give another"
            )
        return trials

    def _refresh(self) -> list[Trial]:
        self.trials = [_record(trial) for trial in self._load()]
        if self.folder.trials() != self.trials:
            self.folder.write(self.trials)
        return self.trials

    # ---- one turn ----------------------------------------------------------------------------------------------------

    def _step(self) -> TrialJob | bool:
        """A trial to execute; True: something was done, look again; False: nothing now."""
        trials = self._load()
        for trial in trials[: self._number_of_trials]:
            if trial.state.name == "RUNNING" and self._is_free(trial):
                return self._take(trial)
        if len(trials) >= self._number_of_trials:
            return False
        self._propose(trials)
        return True

    def _is_free(self, trial: FrozenTrial) -> bool:
        """Whether the trial is not executed, and nobody is about to."""
        fingerprint, worker = trial.user_attrs[FINGERPRINT], trial.user_attrs[WORKER]
        if fingerprint in self._mine:  # by another trial of the same hyperparameters, maybe
            return False
        return (worker == self._worker or self._is_gone(worker)) and self._is_gone(fingerprint)

    def _is_gone(self, claim: str) -> bool:
        """Whether the claim's holder is: at once where it was on this machine, else when no beat came for a lease."""
        if claims.holder(self._locks, claim) is None:
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
        return now - since > claims.LEASE

    def _take(self, trial: FrozenTrial) -> TrialJob | bool:
        fingerprint = trial.user_attrs[FINGERPRINT]
        if self._run(fingerprint).result() is not None:
            self._tell(fingerprint, trial.number, "done", None)
            return True
        if trial.user_attrs[WORKER] != self._worker:
            self._storage.set_trial_user_attr(self._id(trial.number), WORKER, self._worker)
        request = self._request_of(trial.params)
        found = self._resolve(request).spec.fingerprint
        if found != fingerprint:
            self._tell(fingerprint, trial.number, "failed", f"its cell has changed since: it is run {found} now")
            return True
        self._mine[fingerprint] = trial.number
        return TrialJob(trial.number, request, fingerprint)

    def _propose(self, trials: list[FrozenTrial]) -> None:
        """Store the next trial with its run's fingerprint in one write."""
        trial = propose(self.spec, trials)
        fingerprint = self._resolve(self._request_of(trial.params)).spec.fingerprint
        trial.user_attrs = {FINGERPRINT: fingerprint, WORKER: self._worker}
        assert self._turn is not None
        self._turn.check()
        self._study.add_trial(trial)

    def _poll(self) -> list[str]:
        self._refresh()
        if self.spec.pruner is None:
            return []
        return [
            fingerprint
            for fingerprint, number in self._mine.items()
            if self._pruned_at(number, fingerprint) is not None
        ]

    def _tell(self, fingerprint: str, number: int, outcome: Outcome, reason: str | None) -> None:
        """Repeated without harm; nothing is told of a trial that is to be gone on with."""
        from optuna.trial import TrialState as State

        trials = self._load()
        if trials[number].state.is_finished():
            return
        run = self._run(fingerprint)
        result = run.result()
        pruned_at = self._pruned_at(number, fingerprint)
        values = None
        if pruned_at is not None:
            state = State.PRUNED
            reason = f"pruned by search {self.spec.name} at step {pruned_at}"
            self._note_pruning(run, reason)
        elif outcome in ("interrupted", "claimed") or (outcome == "done" and result is None):
            return
        elif result is not None:
            figures = {name: OBJECTIVES[name].of(result) for name in self.spec.objectives}
            lacking = [name for name, figure in figures.items() if figure is None or not math.isfinite(figure)]
            state = State.FAIL if lacking else State.COMPLETE
            reason = f"its result has no figure for {', '.join(lacking)}" if lacking else None
            values = None if lacking else list(figures.values())
        else:
            state = State.FAIL
            reason = f"{outcome}: {reason}" if reason else outcome
        status = run.status()
        steps = result["steps"] if result else status.step if status else 0
        twin = next((t.number for t in trials[:number] if t.user_attrs[FINGERPRINT] == fingerprint), None)
        if twin is not None:
            steps = 0
            reason = f"the same hyperparameters as trial {twin}" if reason is None else reason
        for key, value in ((STEPS, steps), (REASON, reason)):
            self._storage.set_trial_user_attr(self._id(number), key, value)
        self._study.tell(number, values, state)

    def _pruned_at(self, number: int, fingerprint: str) -> int | None:
        """The step at which the pruner ended the trial. The curve decides and not the clock: a trial that was quicker
        than whoever watched it is pruned all the same.
        """
        if self.spec.pruner is None:
            return None
        import optuna

        watched = optuna.trial.Trial(self._study, self._id(number))
        reported = self._study.get_trials(deepcopy=False)[number].intermediate_values
        last = max(reported, default=0)
        for point in self._run(fingerprint).curve():
            step, miou = point["step"], point["miou_train"]
            if miou is None or step < last or step >= self.spec.budget.steps:
                continue
            if step not in reported:
                watched.report(miou, step)
            if watched.should_prune():
                return step
        return None

    def _note_pruning(self, run: RunFolder, reason: str) -> None:
        """In the run folder, where it was stopped before its end."""
        if run.result() is None:
            with contextlib.suppress(Claimed), self._store.claim(run) as run.claim:
                run.set_status("interrupted", reason=reason)

    # ---- small change ------------------------------------------------------------------------------------------------

    def _id(self, number: int) -> int:
        study = self._storage.get_study_id_from_name(self.spec.name)
        return self._storage.get_trial_id_from_study_id_trial_number(study, number)

    def _run(self, fingerprint: str) -> RunFolder:
        return RunFolder(self._store.root / fingerprint)

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
        steps=trial.user_attrs.get(STEPS, 0),
        reason=trial.user_attrs.get(REASON),
    )
