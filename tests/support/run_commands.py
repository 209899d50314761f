"""Runs by the command line in separate processes, the expected result of a finished one, and damage to its files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import load_file

from harness.cells.resolve import Request
from harness.runs.folder import RunFolder
from harness.runs.metrics import load_confusions
from harness.runs.store import RunStore
from tests.support.tiny_cell import run_arguments
from tests.support.warm_start import Started, Starter

LONGER = 30
"""Steps of the budget of runs that are interrupted."""


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A run that was stopped twice, and the checkpoint that the second stop removed."""

    runs: Path
    first_checkpoint: Path
    commands: tuple[Started, Started]


def only_run(runs: Path) -> RunFolder:
    (run,) = RunStore(runs)
    return run


def curve(runs: Path) -> list[dict[str, Any]]:
    """Of the only run; empty before there is one."""
    return next((run.curve() for run in RunStore(runs)), [])


def finished(start: Starter, dataset: Path, budget_file: Path, runs: Path, *more: str) -> RunFolder:
    command = start(*run_arguments(dataset, budget_file, runs, *more))
    assert command.wait() == 0, command.stderr
    return only_run(runs)


def request(dataset: Path, budget_file: Path, **fields: Any) -> Request:
    """The tiny cell, as `run_arguments` has it."""
    cell = {"method": "spm", "backbone": "test_resnet", "weights": "random", "head": "fpn:16", **fields}
    return Request(dataset=str(dataset), budget=str(budget_file), **cell)


def outcome(run: RunFolder) -> dict[str, Any]:
    """Everything of a finished run that must not depend on when and where it was executed."""
    result, status = run.read_result(), run.status()
    assert status is not None
    confusions = load_confusions(run.confusions_path)
    with safe_open(run.delta_path, "np") as stored:
        header = stored.metadata()
    return {
        "folder": run.path.name,
        "delta": {name: (t.dtype.str, t.shape, t.tobytes()) for name, t in load_file(run.delta_path).items()},
        "header": header,
        "result": result.model_dump(include={"metrics", "parameters", "delta_bytes", "steps", "train_flops"}),
        "images": (result.images, confusions.names, confusions.groups),
        "confusions": confusions.matrices.tolist(),
        "curve": [{key: point[key] for key in point if key != "images_per_second"} for point in run.curve()],
        "samples": {path.name: path.read_bytes() for path in run.samples_path.iterdir()},
        "state": status.state,
        "temporary": [path.name for path in run.path.rglob("*") if path.suffix in (".tmp", ".pt")],
    }


def assert_same(run: RunFolder, expected: RunFolder) -> None:
    left, right = outcome(run), outcome(expected)
    for key in left:
        assert left[key] == right[key], f"{key} differs"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of every file."""
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def one_line(text: str) -> str:
    """The error that a command ended with, which must be one line and no traceback."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text and text.rstrip().endswith(errors[0]), text
    return errors[0]


def listed_state(start: Starter, runs: Path) -> str:
    """Of the only run, as `list runs` prints it."""
    command = start("list", "runs", "--json", "--runs", str(runs))
    assert command.wait() == 0, command.stderr
    (listed,) = json.loads(command.stdout)
    return listed["status"]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.partition("-")[0])


def damage(path: Path, how: str) -> None:
    """`how`: truncated, or flipped for one bit."""
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
