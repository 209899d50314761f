"""Frozen stages are computed once: cached features and runs side by side change no bit of any result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from harness.cells.resolve import Cell, Request, resolve
from harness.engine.options import ExecutionOptions
from harness.engine.run import execute
from harness.engine.side_by_side import execute_side_by_side
from harness.engine.training import TrainState, interrupted
from harness.features.policy import FeatureCachePolicy
from harness.features.store import FeatureStream
from harness.runs.folder import RunFolder
from harness.runs.state import Outcome, RunEnded, RunState
from harness.runs.store import RunStore
from tests.support import step_costs
from tests.support.tiny_cell import make_dataset

GIGABYTE = 10**9
Run = Callable[..., RunFolder]
Alone = Callable[..., tuple[Any, ...]]


def options(runs: Path, cache_size: int = 0) -> ExecutionOptions:
    return ExecutionOptions(runs=runs, device="cpu", workers=0, tracking="off", cache_size=cache_size)


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty steps, so that some files are whole before the end; two forward passes each."""
    path = tmp_path_factory.mktemp("budgets") / "reuse.yaml"
    path.write_text(
        yaml.safe_dump(
            {"steps": 20, "batch_size": 4, "accumulate": 2, "crop": [32, 32], "warmup": 2, "channels_last": True}
        )
    )
    return path


@pytest.fixture(scope="module")
def cell(colours: Path, budget: Path) -> Callable[..., tuple[Cell, RunStore]]:
    def make(runs: Path, **fields: Any) -> tuple[Cell, RunStore]:
        common = {"backbone": "test_resnet", "weights": "random", "head": "fpn:16", "method": "linear"}
        request = Request(**{"dataset": str(colours), "budget": str(budget), **common, **fields})
        step_costs.lend(runs)
        store = RunStore(runs)
        return resolve(request, store, runs), store

    return make


@pytest.fixture(scope="module")
def run(cell: Callable[..., tuple[Cell, RunStore]]) -> Run:
    def go(runs: Path, cache_size: int = 0, expected_reuses: int = 0, **fields: Any) -> RunFolder:
        made, store = cell(runs, **fields)
        folder = execute(made, store, options(runs, cache_size), quiet=True, expected_reuses=expected_reuses)
        step_costs.keep(runs)
        return folder

    return go


@pytest.fixture(scope="module")
def alone(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, ...]]:
    """The outcome of a cell that shares nothing."""
    runs = tmp_path_factory.mktemp("alone")
    return lambda **fields: outcome(run(runs, **fields))  # a finished one is not executed again


@pytest.fixture
def always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network so small is computed as fast as it is read; the cost model has a test of its own."""
    monkeypatch.setattr(FeatureCachePolicy, "_decide", lambda *_: None)


def outcome(folder: RunFolder) -> tuple[Any, ...]:
    """All results of a run, to the bit."""
    result = folder.read_result()
    step_costs.keep(folder.path.parent)
    with safe_open(folder.delta_path, "pt") as stored:
        delta = {name: stored.get_tensor(name).numpy().tobytes() for name in stored.keys()}  # noqa: SIM118
    with np.load(folder.confusions_path) as stored_matrices:
        confusions = {name: stored_matrices[name].tobytes() for name in stored_matrices}
    curve = [{**point, "images_per_second": None} for point in folder.curve()]
    samples = {path.name: path.read_bytes() for path in folder.samples_path.iterdir()}
    assert result.peak_memory_bytes > 0
    costs = result.peak_memory_bytes, result.train_flops
    return result.metrics, costs, delta, confusions, curve, samples


def reuse(folder: RunFolder) -> dict[str, Any]:
    return folder.read_result().reuse.model_dump()


METHODS = [
    {"method": "linear"},
    {"method": "spm"},
    {"method": "spm", "settings": {"gaps": "3"}, "head": "linear"},
    {"method": "full"},
    {"method": "linear", "settings": {"head_lr": 0.01}},
]
"""Four, one, three and no frozen stages."""


@pytest.mark.parametrize(
    ("backbone", "number"),
    [
        ("test_resnet", 3),
        pytest.param("test_resnet", len(METHODS), marks=pytest.mark.exhaustive),
        pytest.param("vit_tiny_patch16_224", 2, marks=pytest.mark.exhaustive),
    ],
)
def test_cached_features_change_no_bit(
    run: Run, alone: Alone, tmp_path: Path, always_pays: None, backbone: str, number: int
) -> None:
    for order, fields in enumerate(METHODS[:number]):
        found = run(tmp_path, GIGABYTE, expected_reuses=9, backbone=backbone, **fields)
        assert outcome(found) == alone(backbone=backbone, **fields), fields
        used = float(order in (1, 2, 4))  # the cache is empty for the first, and of no use to the fourth
        assert (reuse(found)["training"], reuse(found)["evaluation"]) == (used, used), fields


def test_deeper_prefix_starts_from_a_cached_shallow_one(
    run: Run, alone: Alone, tmp_path: Path, always_pays: None
) -> None:
    run(tmp_path, GIGABYTE, expected_reuses=9, method="spm")
    before = {path.name for path in (tmp_path / ".cache" / "features").iterdir()}
    deeper = run(tmp_path, GIGABYTE, expected_reuses=9, method="linear")
    assert reuse(deeper)["training"] == 1  # no image was augmented again
    added = {path.name for path in (tmp_path / ".cache" / "features").iterdir()} - before
    assert added and not any("stage0" in name or "masks" in name for name in added)
    assert outcome(deeper) == alone(method="linear")


@pytest.mark.parametrize(
    ("first_size", "second_size"),
    [
        (GIGABYTE, GIGABYTE),
        *(pytest.param(*sizes, marks=pytest.mark.exhaustive) for sizes in ((GIGABYTE, 0), (0, GIGABYTE))),
    ],
)
def test_interrupted_run_resumes_with_and_without_cached_features(
    run: Run, alone: Alone, tmp_path: Path, always_pays: None, first_size: int, second_size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunEnded, match="interrupted"):
        patch.setattr(TrainState, "learn", stopping({0.003: 11}))  # within the second file
        run(tmp_path, first_size, expected_reuses=9)
    assert outcome(run(tmp_path, second_size, expected_reuses=9)) == alone()


def test_damaged_and_lost_features_are_recomputed(run: Run, alone: Alone, tmp_path: Path, always_pays: None) -> None:
    run(tmp_path, GIGABYTE, expected_reuses=9)
    files = sorted((tmp_path / ".cache" / "features").glob("*.safetensors"))
    assert len(files) > 6
    for number, path in enumerate(files):
        if number % 3 == 0:
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[(number * 7919) % len(content)] ^= 0x40
            path.write_bytes(content if number % 3 == 1 else content[: len(content) // 2])
    for rate in (0.002, 0.004):
        found = run(tmp_path, GIGABYTE, expected_reuses=9, settings={"head_lr": rate})
        assert outcome(found) == alone(settings={"head_lr": rate})
    assert reuse(found)["training"] > 0.4


def stopping(at: dict[float, int]) -> Callable[..., None]:
    """A `TrainState.learn` that stops as a signal would, at a step for each learning rate of the head."""
    learn = TrainState.learn

    def act(learner: TrainState, *args: Any) -> None:
        if learner.step == at.get(learner.hyperparameters.head_lr):
            learner.save()
            raise interrupted(learner.step)
        learn(learner, *args)

    return act


def test_features_without_benefit_or_space_are_not_cached(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    features = Path(".cache") / "features"

    def cached(runs: Path) -> set[str]:
        return {path.name.rpartition("-")[2] for path in (runs / features).glob("*.safetensors")}

    def log(folder: RunFolder) -> str:
        return folder.log_path.read_text()

    lone = run(tmp_path / "lone", GIGABYTE, expected_reuses=0)
    assert "masks.safetensors" not in cached(tmp_path / "lone") and "training images" not in log(lone)
    small = run(tmp_path / "small", 300_000, expected_reuses=9)
    assert "more than half of --cache-size" in log(small)
    assert "masks.safetensors" not in cached(tmp_path / "small")
    read = FeatureStream.read
    monkeypatch.setattr(FeatureStream, "read", lambda *arguments: time.sleep(0.3) or read(*arguments))
    slow = run(tmp_path / "slow", GIGABYTE, expected_reuses=1)
    assert "not caching" in log(slow) and "reading 0.3" in log(slow)
    assert not (tmp_path / "off" / features).exists()
    run(tmp_path / "off", 0, expected_reuses=9)
    assert not (tmp_path / "off" / features).exists()


def test_changed_frozen_layer_is_not_cached(run: Run, tmp_path: Path, always_pays: None, monkeypatch: Any) -> None:
    from methods.linear import Linear

    run(tmp_path, GIGABYTE, expected_reuses=9)
    attach = Linear.attach

    def secretly(method: Linear, backbone: Any, num_classes: int) -> None:
        attach(method, backbone, num_classes)
        backbone.stages[2][0].downsample[-1].eps = 0.5

    monkeypatch.setattr(Linear, "attach", secretly)
    changed = run(tmp_path, GIGABYTE, expected_reuses=9, settings={"head_lr": 0.002})
    assert reuse(changed) == {**reuse(changed), "frozen_stages": 2}


def test_cells_side_by_side_end_as_alone(
    run: Run, alone: Alone, cell: Callable[..., tuple[Cell, RunStore]], tmp_path: Path
) -> None:
    made = [cell(tmp_path, **fields)[0] for fields in METHODS]
    store = RunStore(tmp_path)
    done = run(tmp_path, **METHODS[1])  # one of them is done already
    before = done.result_path.stat().st_mtime_ns
    outcomes = execute_side_by_side(made, store, options(tmp_path), quiet=True)
    assert outcomes == [Outcome(RunState.DONE)] * len(METHODS)
    assert done.result_path.stat().st_mtime_ns == before
    for fields, one in zip(METHODS, made, strict=True):
        assert outcome(store.folder(one.spec)) == alone(**fields), fields
    with pytest.raises(ValueError, match="the same images"):
        execute_side_by_side([made[0], cell(tmp_path, seed=1)[0]], store, options(tmp_path))


def test_failure_of_one_cell_leaves_the_others_unchanged(
    alone: Alone, cell: Callable[..., tuple[Cell, RunStore]], tmp_path: Path, monkeypatch: Any
) -> None:
    rates = (0.001, 0.002, 9.0, 0.004, 0.003)
    made = [cell(tmp_path, settings={"head_lr": rate})[0] for rate in rates]
    store = RunStore(tmp_path)
    learn = TrainState.learn

    def failing(learner: TrainState, *args: Any) -> None:
        if learner.hyperparameters.head_lr == 0.002 and learner.step == 5:
            raise torch.OutOfMemoryError("no memory left")
        if learner.hyperparameters.head_lr == 9.0 and learner.step == 8:
            next(learner.network.head.parameters()).data.fill_(float("nan"))
        learn(learner, *args)

    monkeypatch.setattr(TrainState, "learn", failing)
    with store.lock(store.folder(made[3].spec)):
        outcomes = execute_side_by_side(made, store, options(tmp_path), quiet=True)
    assert [outcome.state for outcome in outcomes] == ["done", "out_of_memory", "diverged", "running", "done"]
    assert f"process {os.getpid()}" in str(outcomes[3].reason)
    for one, ended in zip(made, outcomes, strict=True):
        folder = store.folder(one.spec)
        if ended.state is RunState.RUNNING:
            assert not folder.path.exists()
        else:
            status = json.loads((folder.path / "status.json").read_text())
            assert (status["state"], status["reason"]) == (ended.state, ended.reason)
    monkeypatch.setattr(TrainState, "learn", learn)
    for index in (0, 4):
        assert outcome(store.folder(made[index].spec)) == alone(settings={"head_lr": rates[index]})


def test_interrupted_cells_resume_from_their_own_steps(
    alone: Alone, cell: Callable[..., tuple[Cell, RunStore]], tmp_path: Path
) -> None:
    store = RunStore(tmp_path)
    rates = (0.001, 0.002, 0.003)
    made = [cell(tmp_path, settings={"head_lr": rate})[0] for rate in rates]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainState, "learn", stopping({0.001: 4, 0.002: 9, 0.003: 15}))
        first = execute_side_by_side(made, store, options(tmp_path), quiet=True)
    assert [outcome.state for outcome in first] == ["interrupted"] * 3
    second = execute_side_by_side(made, store, options(tmp_path), quiet=True)
    assert second == [Outcome(RunState.DONE)] * 3
    for one, rate in zip(made, rates, strict=True):
        assert outcome(store.folder(one.spec)) == alone(settings={"head_lr": rate})


def test_seeds_share_a_cached_sliding_evaluation(run: Run, alone: Alone, tmp_path: Path, budget: Path) -> None:
    sliding = tmp_path / "slide.yaml"
    fields = {**yaml.safe_load(budget.read_text()), "evaluation": "slide", "stride": [24, 24]}
    sliding.write_text(yaml.safe_dump(fields))
    weights = {"weights": str(_weights(tmp_path)), "budget": str(sliding)}
    first = run(tmp_path / "cached", GIGABYTE, seed=0, **weights)
    second = run(tmp_path / "cached", GIGABYTE, seed=1, **weights)
    assert (reuse(first)["evaluation"], reuse(second)["evaluation"]) == (0, 1)
    assert outcome(second) == alone(seed=1, **weights)


def test_runs_on_a_fraction_of_the_images_share_nothing_with_others(
    run: Run, alone: Alone, tmp_path: Path, budget: Path, always_pays: None
) -> None:
    half = tmp_path / "half.yaml"
    half.write_text(yaml.safe_dump({**yaml.safe_load(budget.read_text()), "train_fraction": 0.5}))
    whole = run(tmp_path, GIGABYTE, expected_reuses=9)
    first = run(tmp_path, GIGABYTE, budget=str(half), expected_reuses=9)
    second = run(tmp_path, GIGABYTE, budget=str(half), settings={"head_lr": 0.5})
    assert [reuse(one)["training"] for one in (whole, first, second)] == [0, 0, 1]
    assert outcome(first) == alone(budget=str(half)) != outcome(whole)
    counts = [one.read_result().provenance.data["images_to_train_on"] for one in (whole, first)]
    assert counts[1] == -(-counts[0] // 2)


def _weights(folder: Path) -> Path:
    """In a file, so that they do not depend on the seed."""
    from safetensors.torch import save_file

    from harness.models.backbones.families import create

    torch.manual_seed(0)
    save_file(create("test_resnet").state_dict(), folder / "test_resnet.safetensors")
    return folder / "test_resnet.safetensors"


@pytest.mark.exhaustive
def test_features_of_other_data_are_not_shared(run: Run, tmp_path: Path, always_pays: None) -> None:
    first = run(tmp_path, GIGABYTE, expected_reuses=9)
    other = make_dataset(tmp_path / "other")
    changed = other / "images" / "train"
    path = sorted(changed.iterdir())[0]
    path.write_bytes(sorted(changed.iterdir())[1].read_bytes())
    for fields in ({"dataset": str(other)}, {"part": "dev"}, {"seed": 1}):
        assert reuse(run(tmp_path, GIGABYTE, **fields))["training"] == 0
    assert reuse(run(tmp_path, GIGABYTE, settings={"head_lr": 0.5}))["training"] == 1
    assert reuse(first)["training"] == 0
