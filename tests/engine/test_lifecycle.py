"""The life of a run, with real processes and real signals: however it is interrupted, it ends as if it had not been."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file

from harness.cells.resolve import Request, resolve
from harness.cli.listing import rows
from harness.runs.folder import RunFolder
from harness.runs.metrics import load_confusions
from harness.runs.state import RunEnded
from harness.runs.store import RunStore
from harness.spec import Budget, Spec, budget
from tests.support.tiny_cell import STEPS, environment, harness, make_budget, make_dataset, run_arguments
from tests.support.warm_start import Started, Starter

LONGER = 30
"""Steps of the budget of runs that are interrupted."""

Run = Callable[..., Started]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("outputs"))
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_budget(tmp_path_factory.mktemp("budgets") / "longer.yaml", steps=LONGER)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset without ignored pixels: every forward pass and every process has equally many labels."""
    return make_dataset(tmp_path_factory.mktemp("data") / "labelled", ignored_rows=0)


@pytest.fixture(scope="session")
def whole(colours: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of the tiny cell, by the command itself. Not to be changed."""
    runs = tmp_path_factory.mktemp("whole")
    done = harness(*run_arguments(colours, tiny, runs))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]) == only_run(runs).path
    return only_run(runs)


@pytest.fixture(scope="session")
def whole_longer(start: Starter, colours: Path, longer: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of the longer budget that nothing interrupted. Not to be changed."""
    return finished(start, colours, longer, tmp_path_factory.mktemp("whole-longer"))


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A run that was stopped twice, and what the second stop removed."""

    runs: Path
    first_checkpoint: Path
    commands: tuple[Started, Started]


@pytest.fixture(scope="session")
def stopped(start: Starter, colours: Path, longer: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Stopped by SIGTERM, gone on with, stopped by Ctrl-C. Not to be changed."""
    runs, kept = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("kept")
    commands = []
    for number, workers, steps in ((signal.SIGTERM, 0, 3), (signal.SIGINT, 1, 8)):
        command = start(*run_arguments(colours, longer, runs, "--workers", str(workers)))
        command.wait_until(lambda steps=steps: len(curve(runs)) >= steps)
        command.signal_group(number)
        command.wait()
        commands.append(command)
        for path in only_run(runs).checkpoints.folder.glob("*.pt"):
            shutil.copy(path, kept)
    return Stopped(runs, min(kept.iterdir()), (commands[0], commands[1]))


@pytest.fixture
def stopped_runs(stopped: Stopped, tmp_path: Path) -> Path:
    """A copy of the stopped run's `--runs`, to do with as one likes; its curve ends in the half line of a kill."""
    runs = Path(shutil.copytree(stopped.runs, tmp_path / "runs"))
    with only_run(runs).curve_path.open("a") as handle:
        handle.write('{"step": 29, "lo')
    return runs


def only_run(runs: Path) -> RunFolder:
    (run,) = RunStore(runs)
    return run


def curve(runs: Path) -> list[dict[str, Any]]:
    """Of the one run there is; empty before there is one."""
    return next((run.curve() for run in RunStore(runs)), [])


def finished(start: Starter, dataset: Path, budget_file: Path, runs: Path, *more: str) -> RunFolder:
    command = start(*run_arguments(dataset, budget_file, runs, *more))
    assert command.wait() == 0, command.stderr
    return only_run(runs)


def outcome(run: RunFolder) -> dict[str, Any]:
    """Everything of a finished run that may not depend on when and where it was executed."""
    result = run.result()
    assert result is not None
    names, matrices = load_confusions(run.confusions_path)
    with safe_open(run.delta_path, "np") as stored:
        header = stored.metadata()
    return {
        "folder": run.path.name,
        "delta": {name: (t.dtype.str, t.shape, t.tobytes()) for name, t in load_file(run.delta_path).items()},
        "header": header,
        "figures": result.model_dump(include={"metrics", "parameters", "delta_bytes", "steps", "train_flops"}),
        "images": (result.images, names),
        "confusions": matrices.tolist(),
        "curve": [{key: point[key] for key in point if key != "images_per_second"} for point in run.curve()],
        "samples": {path.name: path.read_bytes() for path in run.samples_path.iterdir()},
        "state": run.status().state,
        "left": [path.name for path in run.path.rglob("*") if path.suffix in (".tmp", ".pt")],
    }


def assert_same(run: RunFolder, expected: RunFolder) -> None:
    left, right = outcome(run), outcome(expected)
    for key in left:
        assert left[key] == right[key], f"{key} differs"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def one_line(text: str) -> str:
    """The error that a command ended with, which must be one line and no traceback."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text and text.rstrip().endswith(errors[0]), text
    return errors[0]


# Killed


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["five", "ten"])
def test_killed_at_several_moments_it_ends_as_uninterrupted(
    start: Starter, colours: Path, longer: Path, whole_longer: RunFolder, tmp_path: Path, every: int
) -> None:
    draw = random.Random(2)
    early, middle, late = sorted(draw.sample(range(4, LONGER - 2), 3))
    run = RunStore(tmp_path).folder(resolve(request(colours, longer), RunStore(tmp_path), tmp_path).spec)
    log_length = 0

    def logged(text: str) -> bool:
        return run.log_path.exists() and text in run.log_path.read_text()[log_length:]

    def delay() -> Callable[[], bool]:
        end = time.monotonic() + draw.uniform(0, 1)
        return lambda: time.monotonic() > end

    def steps(count: int) -> Callable[[], bool]:
        return lambda: logged(f"step {count}/") or len(run.curve()) > count

    moments = [
        delay,
        lambda: lambda: any(run.checkpoints.folder.glob(".*.tmp")) or logged("evaluate"),
        lambda: steps(1),
        delay,
        lambda: steps(early),
        lambda: run.path.exists,
        lambda: steps(late),
        lambda: steps(middle),
        lambda: run.delta_path.exists,
        lambda: lambda: logged("evaluate 1/"),
    ][::every]
    codes = []
    for moment in moments:
        log_length = run.log_path.stat().st_size if run.log_path.exists() else 0
        command = start(*run_arguments(colours, longer, tmp_path, "--checkpoint-seconds", "0"))
        command.wait_until(moment())
        command.kill()
        codes.append(command.wait())
        assert codes[-1] in (0, -signal.SIGKILL), command.stderr
    # On a strange machine a moment may pass unseen; the run is then finished before it is killed.
    assert codes.count(-signal.SIGKILL) >= len(moments) / 2
    assert "resuming from step" in run.log_path.read_text()
    assert_same(finished(start, colours, longer, tmp_path), whole_longer)


def listed_state(start: Starter, runs: Path) -> str:
    """Of the only run there is, as `list runs` says."""
    command = start("list", "runs", "--json", "--runs", str(runs))
    assert command.wait() == 0, command.stderr
    (listed,) = json.loads(command.stdout)
    return listed["status"]


def test_the_claim_of_a_killed_process_with_live_workers_is_free_at_once(
    start: Starter, colours: Path, tiny: Path, whole: RunFolder, tmp_path: Path
) -> None:
    command = start(*run_arguments(colours, tiny, tmp_path, "--workers", "2", "--checkpoint-seconds", "0"))
    command.wait_until(lambda: len(curve(tmp_path)) > 0)
    command.signal_group(signal.SIGSTOP)  # the workers cannot notice that they are orphans
    assert listed_state(start, tmp_path) == "running"
    command.kill()
    try:
        assert listed_state(start, tmp_path) == "interrupted"
        again = start(*run_arguments(colours, tiny, tmp_path))
        assert again.wait() == 0, again.stderr
    finally:
        command.signal_group(signal.SIGKILL)
    assert_same(only_run(tmp_path), whole)


# Asked to stop


@pytest.mark.parametrize("which", [0, 1], ids=["SIGTERM", "Ctrl-C with a worker"])
def test_asked_to_stop_it_exits_130_with_one_word_and_no_traceback(stopped: Stopped, which: int) -> None:
    command = stopped.commands[which]
    assert command.wait() == 130
    assert "Traceback" not in command.stderr
    assert re.fullmatch(r"error: interrupted: stopped after step \d+", one_line(command.stderr))


def test_a_stopped_run_says_where_and_keeps_a_checkpoint_of_that_step(stopped: Stopped) -> None:
    run = only_run(stopped.runs)
    status, checkpoint = run.status(), run.checkpoints.latest()
    assert status is not None and status.state == "interrupted" and 8 <= status.step < LONGER
    assert checkpoint is not None and checkpoint[0] == status.step
    assert status.reason == f"stopped after step {status.step}"
    assert run.result() is None


def test_the_same_command_goes_on_after_a_stop_from_a_half_written_curve_and_ends_as_uninterrupted(
    start: Starter, stopped: Stopped, stopped_runs: Path, colours: Path, longer: Path, whole_longer: RunFolder
) -> None:
    assert f"resuming from step {step_of(stopped.first_checkpoint)}" in stopped.commands[1].stderr
    status = only_run(stopped_runs).status()
    command = start(*run_arguments(colours, longer, stopped_runs))
    assert command.wait() == 0
    assert status is not None and f"resuming from step {status.step}" in command.stderr
    assert_same(only_run(stopped_runs), whole_longer)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_asked_to_stop_while_it_evaluates_it_says_so_and_goes_on_from_the_end_of_training(
    start: Starter, colours: Path, tmp_path: Path, number: signal.Signals, tiny: Path, whole: RunFolder
) -> None:
    command = start(*run_arguments(colours, tiny, tmp_path))
    command.wait_until(lambda: any(run.samples_path.exists() for run in RunStore(tmp_path)))
    command.signal_group(number)
    assert command.wait() == 130, command.stderr
    assert "Traceback" not in command.stderr
    status = only_run(tmp_path).status()
    assert status is not None and status.state == "interrupted" and status.step == STEPS
    if number == signal.SIGTERM:
        return
    assert_same(finished(start, colours, tiny, tmp_path), whole)


# Done


def test_done_it_prints_the_result_touches_nothing_and_leaves_torch_alone(
    whole: RunFolder, colours: Path, tiny: Path
) -> None:
    before = snapshot(whole.path)
    python = [sys.executable, "-X", "importtime", "-m", "harness"]
    arguments = map(str, run_arguments(colours, tiny, whole.path.parent))
    done = subprocess.run([*python, *arguments], capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    result = whole.result()
    assert result is not None and f"{result.metrics.miou:.4f}" in done.stdout
    assert done.stdout.splitlines()[-1] == str(whole.path)
    assert snapshot(whole.path) == before
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "harness.cells.resolve" in imported
    assert not imported & {"torch", "timm", "mmcv", "mmseg", "mlflow"}


def test_again_does_it_afresh_with_the_same_outcome_and_keeps_the_old_folder(
    start: Starter, whole: RunFolder, colours: Path, tiny: Path, tmp_path: Path
) -> None:
    runs = Path(shutil.copytree(whole.path.parent, tmp_path / "runs"))
    before = snapshot(only_run(runs).path)
    again = finished(start, colours, tiny, runs, "--again")
    (old,) = (runs / ".superseded").iterdir()
    assert snapshot(old) == before
    assert snapshot(again.path).keys() == before.keys()
    assert all(snapshot(again.path)[name] != before[name] for name in ("result.json", "delta.safetensors"))
    assert_same(again, whole)
    status = again.status()
    assert status is not None and status.attempt == 2


# Claimed


def test_a_run_that_another_process_executes_is_refused_in_one_line(
    start: Starter, colours: Path, tiny: Path, whole: RunFolder, tmp_path: Path
) -> None:
    first = start(*run_arguments(colours, tiny, tmp_path))
    first.wait_until(lambda: len(curve(tmp_path)) > 0)
    first.signal_group(signal.SIGSTOP)
    second = start(*run_arguments(colours, tiny, tmp_path))
    code = second.wait()
    first.signal_group(signal.SIGCONT)
    assert code == 2 and second.stdout == ""
    assert f"{only_run(tmp_path).fingerprint} is being executed by process {first.pid} on " in one_line(second.stderr)
    assert first.wait() == 0, first.stderr
    assert_same(only_run(tmp_path), whole)


def test_of_two_started_at_once_one_executes(
    start: Starter, colours: Path, tiny: Path, whole: RunFolder, tmp_path: Path
) -> None:
    both = [start(*run_arguments(colours, tiny, tmp_path)) for _ in range(2)]
    codes = sorted(command.wait() for command in both)
    # Where one was late by the whole of the other's run, it found the result.
    assert codes in ([0, 2], [0, 0]), [command.stderr for command in both]
    assert only_run(tmp_path).log_path.read_text().count("training on") == 1
    assert_same(only_run(tmp_path), whole)


# Damaged


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.partition("-")[0])


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_truncated_checkpoint_is_named_and_the_run_starts_over(
    start: Starter, stopped_runs: Path, colours: Path, longer: Path, whole_longer: RunFolder
) -> None:
    (checkpoint,) = only_run(stopped_runs).checkpoints.folder.iterdir()
    damage(checkpoint, "truncated")
    command = start(*run_arguments(colours, longer, stopped_runs))
    assert command.wait() == 0, command.stderr
    assert f"{checkpoint.with_suffix('.damaged')} is damaged" in command.stderr
    assert "resuming" not in command.stderr
    assert_same(only_run(stopped_runs), whole_longer)


def test_one_flipped_bit_in_a_checkpoint_is_seen_and_an_older_one_taken(
    start: Starter, stopped: Stopped, stopped_runs: Path, colours: Path, longer: Path, whole_longer: RunFolder
) -> None:
    folder = only_run(stopped_runs).checkpoints.folder
    (newer,) = folder.iterdir()
    damage(newer, "flipped")
    older = stopped.first_checkpoint
    shutil.copy(older, folder)
    assert step_of(older) < step_of(newer)
    command = start(*run_arguments(colours, longer, stopped_runs))
    assert command.wait() == 0, command.stderr
    assert f"resuming from step {step_of(older)}\n" in command.stderr
    assert_same(only_run(stopped_runs), whole_longer)


def test_a_damaged_result_is_said_and_done_again(
    start: Starter, whole: RunFolder, colours: Path, tiny: Path, tmp_path: Path
) -> None:
    runs = Path(shutil.copytree(whole.path.parent, tmp_path / "runs"))
    damage(only_run(runs).result_path, "truncated")
    command = start(*run_arguments(colours, tiny, runs))
    assert command.wait() == 0, command.stderr
    assert f"{only_run(runs).result_path} is damaged; the run starts over" in command.stderr
    assert_same(only_run(runs), whole)


# Ended without a result


def assert_row_without_result(run: RunFolder, state: str, reason: str) -> None:
    assert run.result() is None and not run.result_path.exists()
    status = run.status()
    assert status is not None and status.state == state and reason in str(status.reason)
    (row,) = rows("runs", run.path.parent, run.path.parent)
    assert row["status"] == state and row["reason"] == status.reason and "metrics" not in row


def test_a_loss_that_is_not_finite_ends_as_diverged(start: Starter, colours: Path, tiny: Path, tmp_path: Path) -> None:
    # Frozen statistics cannot hold back what a weight of thousands in every layer multiplies up to.
    explosive = ["--method", "full"]
    for setting in ("freeze_statistics=true", "lr=10", "head_lr_scale=1000"):
        explosive += ["--set", setting]
    command = start(*run_arguments(colours, tiny, tmp_path, *explosive))
    assert command.wait() == 1, command.stderr
    run = only_run(tmp_path)
    status = run.status()
    assert status is not None and 1 < status.step <= STEPS
    reason = f"the loss was not finite at step {status.step}; try a smaller learning rate (--set lr=, now 10)"
    assert one_line(command.stderr) == f"error: diverged: {reason}"
    assert_row_without_result(run, "diverged", reason)


def test_crops_that_no_memory_holds_end_as_out_of_memory(start: Starter, colours: Path, tmp_path: Path) -> None:
    # Three pebibytes: beyond what a process can address, so that no allocator grants them on credit.
    huge = make_budget(tmp_path / "huge.yaml", crop=[2**24, 2**24])
    command = start(*run_arguments(colours, huge, tmp_path / "runs", "--workers", "1"))
    assert command.wait() == 1, command.stderr
    assert one_line(command.stderr).startswith("error: out of memory: out of memory after step 0; give a budget with")
    assert_row_without_result(only_run(tmp_path / "runs"), "out_of_memory", "out of memory after step 0")


def test_a_failure_of_torch_or_numpy_to_allocate_counts_as_out_of_memory() -> None:
    import torch

    from harness.engine.failures import is_out_of_memory

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as numpys:
        np.zeros(2**55, np.uint8)
    assert is_out_of_memory(numpys.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# A full disk


@pytest.mark.parametrize(
    ("left", "where"),
    [(0, "folder"), pytest.param(40_000, "checkpoint", marks=pytest.mark.exhaustive), (1_400_000, "delta")],
    ids=["for nothing", "for no checkpoint", "for no delta"],
)
def test_a_full_disk_is_one_line_and_with_room_made_the_command_goes_on(
    start: Starter, colours: Path, tiny: Path, whole: RunFolder, small_disk: Path, left: int, where: str
) -> None:
    runs = small_disk / "runs"
    other = Path(shutil.copytree(whole.path, runs / ("0" * 16)))
    before = snapshot(other)
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - left))
    command = start(*run_arguments(colours, tiny, runs))
    assert command.wait() == 2, command.stderr
    run = runs / whole.fingerprint
    assert one_line(command.stderr).startswith(f"error: {run}: No space left on device; make room")
    assert not list(small_disk.rglob("*.tmp"))
    assert snapshot(other) == before
    assert run.exists() == (where != "folder")
    if run.exists():
        status = RunFolder(run).status()
        assert status is not None and status.state == "failed" and "No space left" in str(status.reason)
    if where == "checkpoint":
        return
    filler.unlink()
    again = start(*run_arguments(colours, tiny, runs))
    assert again.wait() == 0, again.stderr
    assert (f"resuming from step {STEPS}" in again.stderr) == (where == "delta")
    assert_same(RunFolder(run), whole)


# However it is divided


@pytest.fixture(scope="session")
def probe(start: Starter, labelled: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One process, one forward pass a step, and nothing in the network that looks across a batch."""
    return finished(start, labelled, tiny, tmp_path_factory.mktemp("probe"), "--method", "linear", "--head", "linear")


def assert_close(run: RunFolder, expected: RunFolder) -> None:
    """Equal but for the order in which floating-point numbers were added."""
    ours, theirs = load_file(run.delta_path), load_file(expected.delta_path)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_loader_processes_change_nothing(
    start: Starter, colours: Path, tiny: Path, whole: RunFolder, tmp_path: Path
) -> None:
    assert_same(finished(start, colours, tiny, tmp_path, "--workers", "2"), whole)


def test_two_forward_passes_a_step_are_one_of_twice_the_images(
    start: Starter, labelled: Path, probe: RunFolder, tmp_path: Path
) -> None:
    halved = make_budget(tmp_path / "halved.yaml", accumulate=2)
    run = finished(start, labelled, halved, tmp_path / "runs", "--method", "linear", "--head", "linear")
    assert run.fingerprint != probe.fingerprint
    assert_close(run, probe)


def test_two_processes_share_the_batch_and_the_evaluation(
    labelled: Path, tiny: Path, probe: RunFolder, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "harness"]
    arguments = run_arguments(labelled, tiny, tmp_path, "--method", "linear", "--head", "linear")
    done = subprocess.run(
        [*torchrun, *map(str, arguments)], capture_output=True, text=True, env=environment(), timeout=900
    )
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    assert done.stdout.splitlines()[-1] == str(run.path) and done.stdout.count(str(run.path)) == 1
    result, expected = run.result(), probe.result()
    assert result is not None and expected is not None
    assert run.fingerprint == probe.fingerprint and result.provenance.processes == 2
    assert result.images == expected.images == STEPS * 4
    assert_close(run, probe)
    (names, matrices), (expected_names, expected_matrices) = map(
        load_confusions, (run.confusions_path, probe.confusions_path)
    )
    assert names == expected_names
    np.testing.assert_array_equal(matrices.sum(2), expected_matrices.sum(2))  # each image's labels, each once
    assert {path.name for path in run.samples_path.iterdir()} == {path.name for path in probe.samples_path.iterdir()}


def test_bf16_trains_to_finite_figures(start: Starter, colours: Path, whole: RunFolder, tmp_path: Path) -> None:
    run = finished(start, colours, make_budget(tmp_path / "bf16.yaml", precision="bf16"), tmp_path / "runs")
    assert run.fingerprint != whole.fingerprint
    assert all(np.isfinite(point["loss"]) for point in run.curve())
    for name, tensor in load_file(run.delta_path).items():
        assert np.isfinite(tensor).all(), name
        assert tensor.dtype != np.float16
    assert outcome(run)["delta"] != outcome(whole)["delta"]


# What is equal for all methods


def request(dataset: Path, budget_file: Path, **fields: Any) -> Request:
    """The tiny cell, as `run_arguments` has it."""
    cell = {"method": "spm", "backbone": "resnet10t", "weights": "random", "head": "fpn:16", **fields}
    return Request(dataset=str(dataset), budget=str(budget_file), **cell)


@pytest.fixture
def handed_to_the_loop(
    colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, bytes], list[bytes]]]:
    """The head's tensors and the crops of the first epochs that a cell's training would begin with."""
    from harness.engine import training
    from harness.engine.options import ExecutionOptions
    from harness.engine.run import execute

    def begin(method: str, seed: int) -> tuple[dict[str, bytes], list[bytes]]:
        seen: dict[str, Any] = {}

        def train(states: Any, source: Any) -> None:
            head = states[0].network.head.state_dict()
            seen["head"] = {name: t.numpy().tobytes() for name, t in head.items()}
            seen["crops"] = [t.numpy().tobytes() for batch in source.passes(0) for t in (batch.images, batch.masks)]
            raise training.interrupted(0)

        monkeypatch.setattr(training, "train", train)
        store = RunStore(tmp_path)
        cell = resolve(request(colours, tiny, method=method, seed=seed), store, tmp_path)
        options = ExecutionOptions(runs=tmp_path, device="cpu", workers=0, tracking="off", cache_size=0)
        with pytest.raises(RunEnded):
            execute(cell, store, options, quiet=True)
        return seen["head"], seen["crops"]

    return begin


def test_at_one_seed_all_methods_begin_with_the_same_head_and_see_the_same_crops(
    handed_to_the_loop: Callable[..., tuple[dict[str, bytes], list[bytes]]],
) -> None:
    spm, linear, full = (handed_to_the_loop(method, 0) for method in ("spm", "linear", "full"))
    assert spm == linear == full
    head, crops = handed_to_the_loop("linear", 1)
    assert head != linear[0]
    assert not set(crops) & set(linear[1])


# The fingerprint

SPEC = Spec(
    method="spm",
    hyperparameters={"lr": 0.001, "hidden": 32},
    backbone="resnet10t",
    weights="random",
    dataset="colours",
    data_digest="0" * 64,
    head="fpn",
    budget=Budget(name="tiny", steps=12, batch_size=4, crop=(32, 32)),
    seed=0,
)
OTHER = {
    "method": "full",
    "hyperparameters": {"lr": 0.001, "hidden": 16},
    "method_code": "sha256:" + "2" * 64,
    "backbone": "resnet18",
    "weights": "timm:resnet10t.c3_in1k",
    "data_digest": "1" * 64,
    "head": "fpn:16",
    "seed": 1,
    "part": "dev",
}
OTHER_BUDGET = {
    "steps": 13,
    "batch_size": 8,
    "accumulate": 2,
    "crop": (32, 64),
    "resize": (0.5, 1.0),
    "flip": 0.0,
    "photometric": False,
    "warmup": 1,
    "power": 1.0,
    "clip_norm": 0.0,
    "precision": "bf16",
    "dev_fraction": 0.5,
    "channels_last": True,
}
SLIDE = {"evaluation": "slide", "stride": (16, 16)}


def test_every_field_that_can_change_a_figure_changes_the_fingerprint() -> None:
    changed = [SPEC.model_copy(update={field: value}) for field, value in OTHER.items()]
    budgets = [SPEC.budget.model_copy(update={field: value}) for field, value in OTHER_BUDGET.items()]
    budgets += [SPEC.budget.model_copy(update=SLIDE), SPEC.budget.model_copy(update=SLIDE | {"stride": (8, 8)})]
    changed += [SPEC.model_copy(update={"budget": other}) for other in budgets]
    # model_copy keeps what was computed, so each is built anew.
    prints = {Spec.model_validate(spec.model_dump()).fingerprint for spec in [SPEC, *changed]}
    assert len(prints) == 1 + len(changed)


def test_a_field_that_came_later_leaves_older_fingerprints_as_they_were() -> None:
    assert SPEC.fingerprint == "933fb48d020bbaec"


def test_no_field_is_forgotten_above() -> None:
    assert Spec.model_fields.keys() == OTHER.keys() | {"budget", "dataset"}
    assert Budget.model_fields.keys() == OTHER_BUDGET.keys() | SLIDE.keys() | {"name"}


def test_names_and_places_do_not_change_the_fingerprint(colours: Path, tiny: Path, tmp_path: Path) -> None:
    here = resolve(request(colours, tiny), RunStore(tmp_path / "a"), tmp_path).spec
    moved = Path(shutil.copytree(colours, tmp_path / "data" / "renamed"))
    renamed = Path(shutil.copy(tiny, tmp_path / "renamed.yaml"))
    assert budget(str(renamed)).name == "renamed"
    there = resolve(request(moved, renamed), RunStore(tmp_path / "b"), tmp_path / "data").spec
    assert (here.dataset, here.budget.name) != (there.dataset, there.budget.name)
    assert here.fingerprint == there.fingerprint


def test_a_run_is_named_by_the_fingerprint_of_the_spec_that_it_keeps(whole: RunFolder) -> None:
    spec = whole.spec()
    assert spec.fingerprint == whole.path.name
    assert yaml.safe_load((whole.path / "spec.yaml").read_text())["seed"] == spec.seed == 0
    assert json.loads(whole.result_path.read_text())["fingerprint"] == whole.path.name
    assert os.path.samefile(RunStore(whole.path.parent).folder(spec).path, whole.path)
