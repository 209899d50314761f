"""A search makes the same trials however it is interrupted, as many as planned, and executes none twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cells.resolve import Resolver
from harness.errors import UserError
from harness.runs.state import Outcome, RunState
from studies.search.optuna_storage import open_storage
from studies.search.samplers import quiet_optuna
from studies.search.spec import Range
from tests.support.searching import GRID, SPACE, STEPS, Place, drive, execute_trial, quality, start, work_until_killed


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with tables and nothing in them: to create it takes a second, to copy it none."""
    path = tmp_path_factory.mktemp("schema") / "optuna.db"
    with quiet_optuna():
        open_storage(f"sqlite:///{path}")
    return path


@pytest.fixture
def place(tmp_path: Path, colours: Path, tiny: Path, schema: Path) -> Place:
    (tmp_path / "runs").mkdir()
    shutil.copy(schema, tmp_path / "runs" / "optuna.db")
    return Place(tmp_path / "runs", colours, tiny)


@pytest.fixture
def another(tmp_path: Path, colours: Path, tiny: Path) -> Place:
    """A second run store, with nothing in it."""
    return Place(tmp_path / "more runs", colours, tiny)


def finish(place: Place, trials: int, **options: object) -> list:
    with place.open(trials, **options) as search:
        return drive(place, search)


def test_trial_of_several_seeds_is_their_mean(place: Place) -> None:
    trials = finish(place, 3, seeds=(0, 4))
    for trial in trials:
        runs = [place.run(fingerprint) for fingerprint in (trial.fingerprint, *trial.others)]
        scores = [run.read_result().metrics.miou for run in runs]
        assert [run.spec().seed for run in runs] == [0, 4] and scores[1] == pytest.approx(scores[0] + 0.04)
        assert trial.values == [pytest.approx(sum(scores) / 2)] and trial.steps == 2 * STEPS
    assert len(place.executed) == len(set(place.executed)) == 6


def test_trial_with_a_failed_seed_has_failed(place: Place) -> None:
    with place.open(1, seeds=(0, 1)) as search:
        first = search.next()
        assert first is not None and first.request.seed == 0
        execute_trial(place, first)
        search.ended(first.fingerprint, Outcome(RunState.DONE))
        assert search.next(seed=0) is None and not search.finished
        second = search.next(seed=1)
        assert second is not None and second.request.seed == 1
        search.ended(second.fingerprint, Outcome(RunState.DIVERGED, "the loss was not finite"))
        (trial,) = search.trials
        assert (trial.state, trial.values, search.finished) == ("failed", None, True)


def test_pruner_takes_trials_of_one_seed(place: Place) -> None:
    with pytest.raises(UserError, match="only trials of one seed can be pruned"):
        place.open(1, seeds=(0, 1), pruner="median")


# The same trials


@pytest.mark.parametrize(("trials", "options"), [(12, {}), (5, {"pruner": "hyperband"})])
def test_killed_search_makes_the_same_trials(place: Place, another: Place, trials: int, options: dict) -> None:
    """The kills are at random calls of functions, so in every phase of a trial.

    Twelve trials, as TPE uses earlier trials from the eleventh on.
    """
    whole = finish(place, trials, **options)
    draw = random.Random(0)
    killed = 0
    while True:
        process = start(work_until_killed, another, trials, draw.randint(500, 5_000), options)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
    assert killed >= 3
    with another.open(trials, **options) as search:
        assert search.trials == whole
    assert len(set(another.executed)) == trials


@pytest.mark.parametrize(
    "sampler", ["random", "grid", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("qmc", "nsgaii"))]
)
def test_proposals_do_not_depend_on_the_process(place: Place, another: Place, sampler: str) -> None:
    """Nor, within a generation, on which trials have ended by then."""
    space = GRID if sampler == "grid" else SPACE
    trials = 4
    whole = finish(place, trials, space=space, sampler=sampler)
    at_once = replace(another, root=another.root.with_name("at once"))
    with at_once.open(trials, space, sampler=sampler) as search:
        jobs = [job for _ in range(trials) if (job := search.next())]
        for job in jobs:
            execute_trial(at_once, job)
            search.ended(job.fingerprint, Outcome(RunState.DONE))
    assert search.trials == whole
    for _ in range(trials):
        with another.open(trials, space, sampler=sampler) as search:
            job = search.next()
            assert job is not None
            execute_trial(another, job)
            search.ended(job.fingerprint, Outcome(RunState.DONE))
    assert search.trials == whole
    assert len({tuple(trial.settings.values()) for trial in whole}) == trials


def test_extended_search_makes_the_same_trials(place: Place, another: Place) -> None:
    first = finish(place, 2)
    assert finish(place, 4)[:2] == first
    assert finish(place, 4) == finish(another, 4)
    assert len(place.executed) == 4


def test_search_with_a_lost_storage_executes_nothing_twice(place: Place) -> None:
    before = finish(place, 3)
    (place.root / "optuna.db").unlink()
    assert finish(place, 3) == before
    assert len(place.executed) == 3


def test_damaged_list_of_trials_is_repaired(place: Place) -> None:
    before = finish(place, 2)
    search = place.open(2)
    (search.folder.path / "trials.json").write_text('[{"number": 0, "st')
    assert search.folder.trials() == []
    search.poll()
    assert search.folder.trials() == before


# Who executes what


def test_trial_of_another_process_is_taken_over_when_that_dies(place: Place) -> None:
    with place.open(1) as holding, place.open(1) as waiting:
        job = holding.next()
        assert job is not None
        assert waiting.next() is None
        holding.close()
        assert waiting.next() == job


def test_trial_of_a_dead_worker_with_a_live_run_is_not_touched(place: Place) -> None:
    with place.open(1) as dead:
        job = dead.next()
        assert job is not None
    run = place.run(job.fingerprint)
    with place.open(1) as search:
        with place.store.lock(run):
            assert search.next() is None
        assert search.next() == job


def test_unrecorded_result_is_recorded_without_a_rerun(place: Place) -> None:
    with place.open(1) as dead:
        job = dead.next()
        assert job is not None
        execute_trial(place, job)
    with place.open(1) as search:
        assert search.next() is None
        assert search.finished
        assert search.trials[0].values == [quality(job)]


def test_stalled_worker_loses_its_trial(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_LEASE", "0.5")
    stopped = start(_take_one_and_stop, place)
    try:
        _until(lambda: _state(stopped.pid) == "T")
        with place.open(1) as search:
            _until(lambda: search.next() is not None)
    finally:
        stopped.kill()
        stopped.join()


def _take_one_and_stop(place: Place) -> None:
    with place.open(1) as search:
        assert search.next() is not None
        os.kill(os.getpid(), signal.SIGSTOP)


def _state(pid: int | None) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _until(reached: Callable[[], bool], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.02)


def test_interrupted_trial_is_resumed(place: Place) -> None:
    with place.open(1) as search:
        job = search.next()
        assert job is not None
        assert search.next() is None
        search.ended(job.fingerprint, Outcome(RunState("interrupted"), "stopped after step 3"))
        assert search.next() == job


def test_trials_side_by_side_differ(place: Place) -> None:
    with place.open(3) as search:
        jobs = [search.next() for _ in range(4)]
        assert [job.number for job in jobs if job] == [0, 1, 2]
        assert jobs[3] is None
        assert len({job.fingerprint for job in jobs if job}) == 3


# How trials end


@pytest.mark.parametrize("outcome", ["failed", "diverged", "out_of_memory", "unsupported"])
def test_failed_trial_counts_and_has_a_reason(place: Place, outcome: str) -> None:
    with place.open(2) as search:
        job = search.next()
        assert job is not None
        search.ended(job.fingerprint, Outcome(RunState(outcome), "there was no room"))
        assert drive(place, search)[0].state == "failed"
        assert search.trials[0].reason == f"{RunState(outcome).label}: there was no room"
        assert len(search.trials) == 2


def test_result_without_the_objective_is_a_failed_trial(place: Place) -> None:
    with place.open(1) as search:
        job = search.next()
        assert job is not None
        execute_trial(place, job, miou=None)
        search.ended(job.fingerprint, Outcome(RunState.DONE))
        assert (search.trials[0].state, search.trials[0].reason) == ("failed", "its result has no value for miou")


def test_equal_hyperparameters_are_executed_once(place: Place) -> None:
    space = {"kernel": Range(choices=(3, 5)), "hidden": Range(choices=(8,))}
    trials = finish(place, 4, space=space, sampler="random")
    assert len(trials) == 4
    assert sum(trial.steps for trial in trials) == STEPS * len(set(place.executed)) == STEPS * len(place.executed)
    (first, *_), later = trials, [trial for trial in trials if trial.steps == 0]
    assert later[0].reason == f"the same hyperparameters as trial {_twin(trials, later[0]).number}"
    assert first.reason is None


def _twin(trials: list, trial) -> object:
    return next(other for other in trials if other.fingerprint == trial.fingerprint)


def test_pruned_trial_counts_with_its_steps(place: Place) -> None:
    with place.open(8, pruner="median") as search:
        for _ in range(7):
            job = search.next()
            assert job is not None
            execute_trial(place, job)
            search.ended(job.fingerprint, Outcome(RunState.DONE))
        job = search.next()
        assert job is not None
        run = place.run(job.fingerprint)
        with place.store.lock(run) as run.lock:
            run.begin(Resolver(place.store, place.root)(job.request).spec, attempt=1)
            run.append_curve({"step": 1, "miou_train": 0.0})
            assert search.poll() == [job.fingerprint]
            run.finish(Outcome(RunState.INTERRUPTED, "stopped after step 2", 2))
        search.ended(job.fingerprint, Outcome(RunState("interrupted"), "stopped after step 2"))
        assert search.finished
        trial = search.trials[7]
    assert (trial.state, trial.values, trial.steps) == ("pruned", None, 2)
    status = run.status()
    assert status is not None
    assert status.reason == trial.reason == f"pruned by search {search.spec.name} at step 1"


@pytest.mark.parametrize(
    ("pruner", "trials"),
    [("median", 9), pytest.param("hyperband", 8, marks=pytest.mark.exhaustive), ("successive_halving", 4)],
)
def test_pruning_depends_on_the_curve_and_not_on_the_clock(
    place: Place, another: Place, pruner: str, trials: int
) -> None:
    """A trial that ends before the check is pruned like one that is still running."""
    whole = finish(place, trials, pruner=pruner)
    assert "pruned" in {trial.state for trial in whole}
    with another.open(trials, pruner=pruner) as search:
        while not search.finished:
            job = search.next()
            assert job is not None
            execute_trial(another, job)
            search.poll()
            search.ended(job.fingerprint, Outcome(RunState.DONE))
    assert search.trials == whole


# What a user can get wrong


@pytest.mark.parametrize(
    ("message", "trials", "options"),
    [
        ("--trials 0: use at least 1", 0, {}),
        ("sampler tpr: no such sampler; did you mean tpe?", 1, {"sampler": "tpr"}),
        ("pruner mediant: no such pruner; did you mean median?", 1, {"pruner": "mediant"}),
        ("objective moiu: no such objective; did you mean miou?", 1, {"objectives": ("moiu",)}),
        ("--pruner median: Optuna only prunes", 1, {"pruner": "median", "objectives": ("miou", "trained")}),
        ("sampler grid: lr=0.0001:0.01:log is continuous; give it a list", 1, {"sampler": "grid"}),
        ("trials 11: the grid of hidden, kernel has only 10 points", 11, {"sampler": "grid", "space": GRID}),
        ("--storage nonsense: cannot be used", 1, {"storage": "nonsense"}),
        ("--storage oracle+nonsense://host: cannot be used", 1, {"storage": "oracle+nonsense://me:secret@host"}),
        ("--storage journal:/no/such/folder/file: cannot be used", 1, {"storage": "journal:/no/such/folder/file"}),
    ],
)
def test_wrong_arguments_are_one_line(place: Place, message: str, trials: int, options: dict) -> None:
    with pytest.raises(UserError) as refusal:
        place.open(trials, **options)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_foreign_optuna_study_is_refused(place: Place) -> None:
    search = place.open(1)
    search._study.ask()
    with pytest.raises(UserError, match="has trials that this program did not make"):
        search.next()


def test_budget_and_sampler_identify_a_search(place: Place, another: Place, tmp_path: Path) -> None:
    longer = shutil.copy(place.budget, tmp_path / "longer.yaml")
    Path(longer).write_text(place.budget.read_text().replace("steps: 12", "steps: 13"))
    names = {
        place.open(1).spec.name,
        place.open(1, sampler="random").spec.name,
        replace(place, budget=Path(longer)).open(1).spec.name,
    }
    assert len(names) == 3
    assert another.open(1).spec.name in names


def test_nothing_of_optuna_is_printed(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    with place.open(3, pruner="hyperband") as search:
        drive(place, search)
        search.conclude()
    assert capfd.readouterr() == ("", "")
