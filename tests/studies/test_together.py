"""Which cells and trials the scheduler puts into one job, and how a search and a study end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from harness.cells.resolve import Resolver
from harness.engine.options import ExecutionOptions
from harness.launch.job import Job, JobCell, JobResult
from harness.launch.launcher import Launcher
from harness.method import methods
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from studies.plan import Plan, make_plan
from studies.progress import LiveTable
from studies.scheduler import Scheduler, SearchTask
from studies.search.search import TrialJob
from studies.search.spec import declared_space
from studies.study import load_study
from tests.support.in_process import call, refusal
from tests.support.searching import Place, execute_trial
from tests.support.studies_at_hand import finish, write_study


class AtOnce(Launcher):
    """Jobs that cost nothing: their cells end in the order of submission, as `execute` says."""

    name = "at once"

    def __init__(self, slots: int, execute: Callable[[JobCell], RunState]):
        self._slots, self._execute = slots, execute
        self.jobs: list[Job] = []
        self._running: list[Job] = []
        self.most_at_once = 0

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def free(self) -> int:
        return self._slots - len(self._running)

    def submit(self, job: Job) -> None:
        assert self.free
        self.jobs.append(job)
        self._running.append(job)
        self.most_at_once = max(self.most_at_once, len(self._running))

    def wait(self, seconds: float) -> list[JobResult]:
        if not self._running:
            time.sleep(seconds)
            return []
        return [JobResult(cell, Outcome(self._execute(cell), "a test")) for cell in self._running.pop(0).cells]

    def stop(self, fingerprint: str) -> None:
        raise AssertionError("nothing of this runs long enough")

    def close(self) -> None:
        pass


@dataclass
class Executed:
    """A study that was executed to its end."""

    plan: Plan
    jobs: list[Job]

    def shape(self) -> list[list[tuple[str, int]]]:
        """Method and seed of each cell of each job."""
        return [[(cell.request.method, cell.request.seed) for cell in job.cells] for job in self.jobs]


def execute(
    tmp_path: Path, colours: Path, slots: int, together: int, execute: Callable[[JobCell], RunState] | None = None,
    quiet: bool = True, **fields: Any,
) -> Executed:  # fmt: skip
    store = RunStore(tmp_path / "runs")
    plan = make_plan(load_study(write_study(tmp_path / "s.yaml", colours, **fields)), store, tmp_path)
    options = ExecutionOptions(runs=store.root, data=tmp_path, tracking="off", together=together, cache_size=123)
    resolve = Resolver(store, tmp_path)

    def done(cell: JobCell) -> RunState:
        finish(store.root, resolve(cell.request).spec)
        return RunState.DONE

    launcher = AtOnce(slots, execute or done)
    with LiveTable(plan, store, quiet) as table:
        Scheduler(launcher, options, resolve, plan.cells, [], table.update).run()
    return Executed(plan, launcher.jobs)


def test_cells_of_the_same_images_share_a_job(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = execute(tmp_path, colours, slots=1, together=3, methods=["linear", "spm", "full", "bias"])
    assert found.shape() == [
        [("linear", 0), ("spm", 0), ("full", 0)],
        [("linear", 1), ("spm", 1), ("full", 1)],
        [("bias", 0)],
        [("bias", 1)],
    ]
    assert [job.expected_reuses for job in found.jobs] == [1, 1, 0, 0]
    assert {job.options.cache_size for job in found.jobs} == {123}
    assert {cell.state for cell in found.plan.cells} == {"done"}
    lines = capsys.readouterr().err.splitlines()
    for label in ("head only", "spm", "full", "bias"):  # one line when it starts and one when it ends
        own = [line.rpartition("seed ")[2] for line in lines if line.startswith(f"{label} on ")]
        assert sorted(own) == [f"{seed}: {state}" for seed in (0, 1) for state in ("done, mIoU 0.5000", "running")]


def test_cells_of_different_backbones_do_not_share_a_job(tmp_path: Path, colours: Path) -> None:
    backbones = [{"backbone": name, "weights": "random"} for name in ("resnet10t", "resnet18")]
    found = execute(
        tmp_path, colours, slots=1, together=9, backbones=backbones, heads=["fpn:16", "linear"], methods=["linear"]
    )
    of_one = [{(cell.request.backbone, cell.request.seed) for cell in job.cells} for job in found.jobs]
    assert of_one == [{(name, seed)} for name in ("resnet10t", "resnet18") for seed in (0, 1)]
    assert [[cell.request.head for cell in job.cells] for job in found.jobs] == [["fpn:16", "linear"]] * 4


METHODS = ["linear", "spm", "full", "bias", "norm"]


@pytest.mark.parametrize(
    ("slots", "together", "sizes"),
    [(1, 1, [1, 1, 1, 1, 1]), (1, 8, [5]), (2, 8, [3, 2]), (2, 2, [2, 2, 1]), (4, 3, [2, 1, 1, 1]), (5, 5, [1] * 5)],
)
def test_every_slot_gets_a_job(tmp_path: Path, colours: Path, slots: int, together: int, sizes: list[int]) -> None:
    found = execute(tmp_path, colours, slots, together, methods=METHODS, seeds=1)
    assert [len(job.cells) for job in found.jobs] == sizes


def test_rows_of_the_same_run_execute_it_once(tmp_path: Path, colours: Path) -> None:
    rows = ["linear", {"method": "linear", "label": "the same"}, "spm"]
    found = execute(tmp_path, colours, slots=1, together=3, methods=rows, seeds=1)
    assert found.shape() == [[("linear", 0), ("spm", 0)]]
    assert {cell.state for cell in found.plan.cells} == {"done"}


def test_repeatedly_interrupted_run_is_retried_alone(tmp_path: Path, colours: Path) -> None:
    """As when one of them kills the node of a cluster, and it is unknown which."""

    def dies_of_spm(cell: JobCell) -> RunState:
        alone = len(launched[-1].cells) == 1
        if alone and cell.request.method != "spm":
            finish(store.root, Resolver(store, tmp_path)(cell.request).spec)
            return RunState.DONE
        return RunState.INTERRUPTED

    launched: list[Job] = []

    class Seen(AtOnce):
        def submit(self, job: Job) -> None:
            super().submit(job)
            launched.append(job)

    store = RunStore(tmp_path / "runs")
    plan = make_plan(load_study(write_study(tmp_path / "s.yaml", colours, seeds=1)), store, tmp_path)
    options = ExecutionOptions(runs=store.root, data=tmp_path, tracking="off", together=2)
    Scheduler(Seen(1, dies_of_spm), options, Resolver(store, tmp_path), plan.cells, []).run()
    assert [len(job.cells) for job in launched] == [2, 2, 2, 1, 1]
    assert {cell.label: cell.state for cell in plan.cells} == {"linear": "done", "spm": "interrupted"}


# Trials


@pytest.fixture
def place(tmp_path: Path, colours: Path, tiny: Path) -> Place:
    return Place(tmp_path / "runs", colours, tiny)


def searched(place: Place, trials: int, together: int, slots: int = 1, **options: Any) -> tuple[list, AtOnce]:
    """The trials of a search that was executed, and the launcher with the jobs that they were in."""

    def done(cell: JobCell) -> RunState:
        execute_trial(place, TrialJob(0, cell.request, cell.fingerprint))
        return RunState.DONE

    launcher = AtOnce(slots, done)
    execution = ExecutionOptions(runs=place.root, data=place.root, tracking="off", together=together)
    with place.open(trials, **options) as search:
        Scheduler(launcher, execution, Resolver(place.store, place.root), [], [SearchTask(search)]).run()
        return search.trials, launcher


def test_trials_share_a_job_without_changing_what_is_proposed(place: Place) -> None:
    """With TPE, whose first ten trials are random."""
    trials, launcher = searched(place, 10, together=4)
    assert [len(job.cells) for job in launcher.jobs] == [4, 4, 2]
    assert [job.expected_reuses for job in launcher.jobs] == [6, 2, 0]
    one_by_one, launcher = searched(replace(place, root=place.root.with_name("one by one")), 10, together=1)
    assert [len(job.cells) for job in launcher.jobs] == [1] * 10
    assert one_by_one == trials


@pytest.mark.parametrize(
    ("sampler", "at_once"), [("random", 3), pytest.param("qmc", 3, marks=pytest.mark.exhaustive), ("tpe", 1)]
)
def test_trials_run_at_once_where_scores_do_not_matter(place: Place, sampler: str, at_once: int) -> None:
    trials, launcher = searched(place, 6, together=1, slots=3, sampler=sampler)
    assert launcher.most_at_once == at_once
    one_by_one, _ = searched(replace(place, root=place.root.with_name("one by one")), 6, together=1, sampler=sampler)
    assert one_by_one == trials


def test_trials_with_a_pruner_have_jobs_of_their_own(place: Place) -> None:
    _, launcher = searched(place, 3, together=3, slots=3, sampler="random", pruner="median")
    assert [len(job.cells) for job in launcher.jobs] == [1, 1, 1]
    assert launcher.most_at_once == 1


# The command


def search_arguments(place: Place, *more: str) -> list[str | Path]:
    cell = ["--method", "spm", "--backbone", "test_resnet", "--weights", "random", "--head", "fpn:16"]
    places = ["--dataset", place.dataset, "--budget", place.budget, "--runs", place.root, "--data", place.root]
    return ["search", *cell, *places, "--device", "cpu", "--workers", "0", "--tracking", "off", *more]


def test_search_trains_trials_side_by_side(place: Place) -> None:
    output = call(*search_arguments(place, "--trials", "2", "--together", "2", "--cache-size", "1MB"))
    assert output.code == 0, output.err
    with place.open(2, declared_space(methods.get("spm"))) as search:
        assert [trial.state for trial in search.trials] == ["complete"] * 2
        for trial in search.trials:
            result = place.run(trial.fingerprint).read_result()
            assert result.spec.part == "dev"
            assert trial.values == [result.metrics.miou]
        assert len({place.run(trial.fingerprint).status().pid for trial in search.trials}) == 1


@pytest.mark.parametrize("command", ["compare", "search"])
def test_invalid_cache_size_is_refused_first(place: Place, command: str, tmp_path: Path) -> None:
    study = write_study(tmp_path / "s.yaml", place.dataset)
    arguments = search_arguments(place) if command == "search" else ["compare", study, "--runs", place.root]
    assert refusal(*arguments, "--cache-size", "8 gigs").startswith("--cache-size 8 gigs: invalid size; give a number")
    assert not place.root.exists()
