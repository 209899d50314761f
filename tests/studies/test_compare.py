"""`harness compare` in real processes: bad cells, kills and races, and the results are the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.runs.folder import RunFolder
from harness.runs.metrics import load_confusions
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from studies.plan import make_plan
from studies.study import load_study
from tests.support.studies_at_hand import BUDGET, finish, write_study
from tests.support.tiny_cell import environment
from tests.support.warm_start import Started, Starter

Begin = Callable[..., Started]
QUICK = ("--tracking", "off", "--workers", "0", "--device", "cpu", "--checkpoint-seconds", "0")


@pytest.fixture(scope="session")
def begin(start: Starter) -> Begin:
    """`compare` of a study, in a process of its own."""
    return lambda study, runs, *more, **variables: start("compare", study, "--runs", runs, *QUICK, *more, **variables)


def wait_until(reached: Callable[[], bool], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


def finished(runs: Path) -> list[RunFolder]:
    store = RunStore(runs)
    return [run for run in store if store.outcome(run).state is RunState.DONE]


def executions(run: RunFolder) -> int:
    """How often the run was started from its first step."""
    text = run.log_path.read_text()
    return text.count("training on") - text.count("resuming from step")


def results_of(runs: Path) -> dict[str, Any]:
    """Everything about every run that a repetition must reproduce, by fingerprint."""
    found = {}
    for run in finished(runs):
        result = run.read_result()
        stored = load_confusions(run.confusions_path)
        fields = {"metrics", "parameters", "delta_bytes", "steps", "images"}
        found[run.fingerprint] = [
            result.model_dump(include=fields),
            stored.names,
            stored.groups,
            stored.matrices.tolist(),
        ]
    return found


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Path:
    """The head's learning rate tuned with two trials of `linear`, then `spm` with two of its own; then one seed."""
    budget = {**BUDGET, "steps": 20}
    folder = tmp_path_factory.mktemp("study")
    tune = {"head": {"trials": 2}, "trials": 2, "parameters": ["lr"]}
    return write_study(folder / "tuned.yaml", colours, budget=budget, tune=tune, seeds=1)


@pytest.fixture(scope="session")
def uninterrupted(begin: Begin, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its runs, which nothing interrupted. Not to be changed."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    done = begin(tuned, runs, "--jobs", "2")
    assert done.wait() == 0, done.stderr
    assert len(finished(runs)) == 6
    return runs


def test_compare_executes_every_cell_once_and_then_only_reads(begin: Begin, tuned: Path, uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
    done = begin(tuned, uninterrupted, "--json")
    assert done.wait() == 0 and done.stderr == ""
    cells = json.loads(done.stdout)
    assert [(cell["label"], cell["seed"], cell["state"]) for cell in cells] == [
        ("linear", 0, "done"),
        ("spm", 0, "done"),
    ]
    linear, spm = (cell["settings"] for cell in cells)
    assert set(linear) == {"head_lr"} and set(spm) == {"head_lr", "lr"} and linear["head_lr"] == spm["head_lr"]
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()} == before
    assert all(executions(run) == 1 for run in finished(uninterrupted))


def test_cell_takes_the_best_hyperparameters_of_its_search(tuned: Path, uninterrupted: Path) -> None:
    plan = make_plan(load_study(tuned), RunStore(uninterrupted), uninterrupted)
    (head,), (linear, spm) = plan.heads, plan.searches
    assert (head.label, linear.space) == ("head_lr, with linear", {})
    for row, name, cells in ((head, "head_lr", [*linear.cells, *spm.cells]), (spm, "lr", spm.cells)):
        trials = row.folder.trials()
        assert [trial.state for trial in trials] == ["complete", "complete"]
        of_trials = {trial.fingerprint: RunFolder(uninterrupted / trial.fingerprint).read_result() for trial in trials}
        assert all(result.spec.part == "dev" for result in of_trials.values())
        best = max(trials, key=lambda trial: of_trials[trial.fingerprint].metrics.miou)
        assert {cell.request.settings[name] for cell in cells} == {best.settings[name]}


@pytest.mark.exhaustive
def test_sharing_a_process_does_not_change_results(
    begin: Begin, tuned: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    done = begin(tuned, runs, "--together", "2")
    assert done.wait() == 0, done.stderr
    assert "local: 1 jobs at a time, of up to 2 cells each\n" in done.stderr
    assert results_of(runs) == results_of(uninterrupted)
    assert len({run.status().pid for run in finished(runs)}) == 3  # of each search's trials, and of the cells


def test_stopped_and_killed_study_ends_with_the_same_results(
    begin: Begin, tuned: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    stopped = begin(tuned, runs, "--jobs", "2")
    wait_until(lambda: any(run.curve() for run in RunStore(runs)))
    stopped.signal_group(signal.SIGINT)
    assert stopped.wait() == 130, stopped.stderr
    errors = stopped.stderr
    assert errors.endswith("stopped; run the command again to resume\n") and "Traceback" not in errors
    assert not any(is_running(run) for run in RunStore(runs))

    killed = begin(tuned, runs, "--jobs", "2")
    wait_until(lambda: len(finished(runs)) >= 3)
    assert killed.poll() is None
    killed.kill()

    last = begin(tuned, runs, "--jobs", "2")
    wait_until(lambda: any(is_running(run) for run in RunStore(runs)) or last.poll() is not None)
    for run in RunStore(runs):
        if is_running(run):
            os.kill(run.status().pid, signal.SIGKILL)  # a worker, too
    assert last.wait() == 0, last.stderr
    assert results_of(runs) == results_of(uninterrupted)


SLOW = """
    import pathlib, time
    from harness.method import Method

    class Slow(Method):
        name, summary, source = "slow", "takes long to say whether it supports a backbone", "this test"
        head_only = True

        def attach(self, backbone, num_classes):
            pass

        def parameter_count(self, backbone, num_classes):
            return 0

        def supports(self, backbone):
            pathlib.Path(__file__).with_suffix(".asked").touch()
            time.sleep(3600)
"""


def test_study_stopped_while_it_checks_support_ends_with_one_line(begin: Begin, colours: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "slow.py"
    plugin.write_text(textwrap.dedent(SLOW))
    study = write_study(tmp_path / "s.yaml", colours, methods=["slow"], seeds=1)
    stopped = begin(study, tmp_path / "runs", "--plugin", plugin)
    assert stopped.wait_until(lambda: plugin.with_suffix(".asked").exists()) is None, stopped.stderr
    stopped.signal_group(signal.SIGINT)
    assert stopped.wait() == 130, stopped.stderr
    assert stopped.stderr.splitlines() == [
        "checking which methods support which backbones",
        "stopped; run the command again to resume",
    ]


def is_running(run: RunFolder) -> bool:
    status = run.status()
    return status is not None and status.state == "running" and RunStore(run.path.parent).lock_owner(run) is not None


@pytest.mark.exhaustive
def test_racing_commands_execute_each_cell_once(begin: Begin, colours: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path / "s.yaml", colours)
    racers = [begin(study, tmp_path / "runs") for _ in range(2)]
    assert [racer.wait() for racer in racers] == [0, 0], [racer.stderr for racer in racers]
    assert racers[0].stdout == racers[1].stdout
    assert [executions(run) for run in finished(tmp_path / "runs")] == [1] * 4


@pytest.mark.exhaustive
def test_cell_of_a_dead_machine_is_taken_over(begin: Begin, colours: Path, tmp_path: Path) -> None:
    study, runs = write_study(tmp_path / "s.yaml", colours, methods=["linear"], seeds=1), tmp_path / "runs"
    (cell,) = make_plan(load_study(study), RunStore(runs), tmp_path).cells
    lease = runs / ".locks" / f"{cell.fingerprint}.lease"
    lease.parent.mkdir(parents=True)
    waiting = begin(study, runs, HARNESS_LEASE="3")
    beats = 0

    def is_awaited() -> bool:  # until then the other machine renews its lease, and never after
        nonlocal beats
        beats += 1
        lease.write_text(json.dumps({"id": "0" * 16, "machine": "elsewhere/0", "pid": 1}) + f"\n{beats:012d}\n")
        return waiting.poll() is not None or "executed by process 1 on elsewhere" in waiting.stderr

    wait_until(is_awaited)
    assert waiting.wait() == 0, waiting.stderr
    assert [executions(run) for run in finished(runs)] == [1]


BAD = """
    import time
    from harness.method import Method, knob
    from harness import method

    class Bad(Method):
        name, summary, source = "bad", "fails as it is asked to", "this test"
        head_only = True

        class Hyperparameters(method.Hyperparameters):
            how: str = knob("raise", "which way to fail")

        def attach(self, backbone, num_classes):
            pass

        def parameter_count(self, backbone, num_classes):
            return 0

        def auxiliary_loss(self, masks):
            match self.hyperparameters.how:
                case "raise":
                    raise RuntimeError("a bug of the method")
                case "hang":
                    time.sleep(3600)
                case "memory":
                    bytearray(1 << 60)
                case "diverge":
                    return masks.sum() * float("inf")
"""


@pytest.mark.exhaustive
def test_bad_cells_do_not_stop_the_others(begin: Begin, tmp_path: Path, colours: Path) -> None:
    plugin = tmp_path / "bad.py"
    plugin.write_text(textwrap.dedent(BAD))
    ways = ["raise", "hang", "memory", "diverge"]
    rows = [{"method": "bad", "label": way, "settings": {"how": way}} for way in ways]
    study = write_study(tmp_path / "s.yaml", colours, methods=[*rows, "vpt_deep", "linear"], seeds=1)
    done = begin(study, tmp_path / "runs", "--plugin", plugin, "--jobs", "2", "--time-limit", "0.1", "--json")
    assert done.wait() == 1
    cells = {cell["label"]: cell for cell in json.loads(done.stdout)}
    assert {label: cell["state"] for label, cell in cells.items()} == {
        "raise": "failed", "hang": "timed_out", "memory": "out_of_memory", "diverge": "diverged",
        "vpt_deep": "unsupported", "linear": "done",
    }  # fmt: skip
    assert cells["raise"]["reason"] == "RuntimeError: a bug of the method"
    assert cells["hang"]["reason"] == "took longer than its time limit of 0.1 min (--time-limit)"
    assert "not one" not in done.stderr and "Traceback" not in done.stderr
    for cell in cells.values():  # each has a run folder, for `list runs` and reports too
        status = RunFolder(tmp_path / "runs" / cell["fingerprint"]).status()
        assert status is not None and (status.state, status.reason) == (cell["state"], cell["reason"])

    again = begin(study, tmp_path / "runs", "--plugin", plugin, "--plan", "--json")
    again.wait()
    states = {cell["label"]: cell["state"] for cell in json.loads(again.stdout)}
    assert states == {label: cell["state"] for label, cell in cells.items()}


@pytest.mark.exhaustive
def test_damaged_results_and_checkpoints_are_recomputed(
    begin: Begin, tuned: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    runs = Path(shutil.copytree(uninterrupted, tmp_path / "runs"))
    first, second = [run for run in finished(runs) if run.read_result().spec.part == "report"]
    first.result_path.write_text(first.result_path.read_text()[:100])
    second.result_path.unlink()
    second.finish(Outcome(RunState.INTERRUPTED, step=5))
    checkpoint = second.checkpoints.folder / f"{5:09d}-{'0' * 16}.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"not what the name says")
    done = begin(tuned, runs, "--jobs", "2")
    assert done.wait() == 0, done.stderr
    assert done.stderr.count("the run is executed again") == 1
    assert results_of(runs) == results_of(uninterrupted)
    assert [path.name[:16] for path in (runs / ".superseded").iterdir()] == [first.fingerprint]
    assert "is damaged and was skipped" in second.log_path.read_text()


def test_finished_study_is_planned_without_torch_or_optuna(tmp_path: Path, colours: Path) -> None:
    study = write_study(tmp_path / "s.yaml", colours, methods=["linear", "spm", "full", "lora"], seeds=20)
    for cell in make_plan(load_study(study), RunStore(tmp_path / "runs"), tmp_path).cells:
        assert cell.spec is not None
        finish(tmp_path / "runs", cell.spec)
    code = f"""
        import sys
        import harness.cli.main as cli
        for arguments in (["compare", {str(study)!r}], ["list", "runs"]):
            sys.argv = ["harness", *arguments, "--runs", {str(tmp_path / "runs")!r}]
            try:
                cli.main()
            except SystemExit as stop:
                assert not stop.code, stop.code
        heavy = {{"torch", "optuna", "mlflow", "pandas", "matplotlib", "ray"}} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("20/20" in line.split() and line.endswith("done") for line in lines) == 4
    assert len(lines) == 5 + 81
