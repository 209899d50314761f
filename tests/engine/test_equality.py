"""What must not change a result: loader processes, parts of a batch, processes; and what all methods share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from harness.cells.resolve import resolve
from harness.runs.folder import RunFolder
from harness.runs.metrics import load_confusions
from harness.runs.state import RunEnded
from harness.runs.store import RunStore
from tests.support import step_costs
from tests.support.run_commands import assert_same, finished, only_run, outcome, request
from tests.support.tiny_cell import STEPS, environment, make_budget, run_arguments
from tests.support.tiny_jobs import wait_until
from tests.support.tracked_runs import free_port
from tests.support.warm_start import Starter


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


def test_loader_processes_do_not_change_results(
    start: Starter, colours: Path, tiny: Path, whole: RunFolder, tmp_path: Path
) -> None:
    assert_same(finished(start, colours, tiny, tmp_path, "--workers", "2"), whole)


def test_accumulated_step_equals_a_single_larger_batch(
    start: Starter, labelled: Path, probe: RunFolder, tmp_path: Path
) -> None:
    halved = make_budget(tmp_path / "halved.yaml", accumulate=2)
    run = finished(start, labelled, halved, tmp_path / "runs", "--method", "linear", "--head", "linear")
    assert run.fingerprint != probe.fingerprint
    assert_close(run, probe)


def by_torchrun(start: Starter, arguments: list[str | Path]) -> str:
    """What two processes print."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "harness"]
    command = [*torchrun, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_torchruns_variables(start: Starter, arguments: list[str | Path]) -> str:
    """As `by_torchrun`, without the imports of three cold starts."""
    size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [start(*arguments, RANK=rank, LOCAL_RANK=rank, **size, **place) for rank in "01"]
    try:
        wait_until(lambda: None not in (codes := [process.poll() for process in started]) or any(codes))
        assert [process.poll() for process in started] == [0, 0], "".join(process.stderr for process in started)
    finally:
        for process in started:  # one waits for the other
            process.kill()
    return "".join(process.stdout for process in started)


@pytest.mark.parametrize("launch", [pytest.param(by_torchrun, marks=pytest.mark.exhaustive), with_torchruns_variables])
def test_two_processes_share_batch_and_evaluation(
    start: Starter, labelled: Path, tiny: Path, probe: RunFolder, tmp_path: Path, launch: Callable[..., str]
) -> None:
    printed = launch(start, run_arguments(labelled, tiny, tmp_path, "--method", "linear", "--head", "linear"))
    run = only_run(tmp_path)
    assert printed.splitlines()[-1] == str(run.path) and printed.count(str(run.path)) == 1
    result, expected = run.read_result(), probe.read_result()
    assert run.fingerprint == probe.fingerprint and result.provenance.processes == 2
    assert result.images == expected.images == STEPS * 4
    assert_close(run, probe)
    found, expected = map(load_confusions, (run.confusions_path, probe.confusions_path))
    assert (found.names, found.groups) == (expected.names, expected.groups)
    np.testing.assert_array_equal(found.matrices.sum(2), expected.matrices.sum(2))  # each image's labels, each once
    assert {path.name for path in run.samples_path.iterdir()} == {path.name for path in probe.samples_path.iterdir()}


def test_bf16_training_is_finite(start: Starter, colours: Path, whole: RunFolder, tmp_path: Path) -> None:
    run = finished(start, colours, make_budget(tmp_path / "bf16.yaml", precision="bf16"), tmp_path / "runs")
    assert run.fingerprint != whole.fingerprint
    assert all(np.isfinite(point["loss"]) for point in run.curve())
    for name, tensor in load_file(run.delta_path).items():
        assert np.isfinite(tensor).all(), name
        assert tensor.dtype != np.float16
    assert outcome(run)["delta"] != outcome(whole)["delta"]


# What all methods share


@pytest.fixture
def start_of_training(
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
        step_costs.lend(tmp_path)
        store = RunStore(tmp_path)
        cell = resolve(request(colours, tiny, method=method, seed=seed), store, tmp_path)
        options = ExecutionOptions(runs=tmp_path, device="cpu", workers=0, tracking="off", cache_size=0)
        with pytest.raises(RunEnded):
            execute(cell, store, options, quiet=True)
        return seen["head"], seen["crops"]

    return begin


def test_methods_of_one_seed_start_with_the_same_head_and_crops(
    start_of_training: Callable[..., tuple[dict[str, bytes], list[bytes]]],
) -> None:
    spm, linear, full = (start_of_training(method, 0) for method in ("spm", "linear", "full"))
    assert spm == linear == full
    head, crops = start_of_training("linear", 1)
    assert head != linear[0]
    assert not set(crops) & set(linear[1])
