"""What a run leaves when it is done, rerun, locked, or ended by a failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from harness.cli.listing import list_runs
from harness.runs.folder import RunFolder
from harness.runs.store import RunStore
from tests.support import step_costs
from tests.support.run_commands import assert_same, curve, finished, one_line, only_run, snapshot
from tests.support.tiny_cell import STEPS, environment, run_arguments
from tests.support.warm_start import Starter

# Done


def test_run_folder_is_named_by_the_fingerprint_of_its_spec(whole: RunFolder) -> None:
    spec = whole.spec()
    assert spec.fingerprint == whole.path.name
    assert yaml.safe_load((whole.path / "spec.yaml").read_text())["seed"] == spec.seed == 0
    assert json.loads(whole.result_path.read_text())["fingerprint"] == whole.path.name
    assert os.path.samefile(RunStore(whole.path.parent).folder(spec).path, whole.path)


def test_finished_run_is_printed_without_torch_or_writes(whole: RunFolder, colours: Path, tiny: Path) -> None:
    before = snapshot(whole.path)
    python = [sys.executable, "-X", "importtime", "-m", "harness"]
    arguments = map(str, run_arguments(colours, tiny, whole.path.parent))
    done = subprocess.run([*python, *arguments], capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    assert f"{whole.read_result().metrics.miou:.4f}" in done.stdout
    assert done.stdout.splitlines()[-1] == str(whole.path)
    assert snapshot(whole.path) == before
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "harness.cells.resolve" in imported
    assert not imported & {"torch", "timm", "mmcv", "mmseg", "mlflow"}


def test_force_reruns_with_the_same_result_and_archives_the_old(
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


# Locked


def test_locked_run_is_refused_in_one_line(
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


def test_one_of_two_commands_started_at_once_executes(
    start: Starter, colours: Path, tiny: Path, whole: RunFolder, tmp_path: Path
) -> None:
    both = [start(*run_arguments(colours, tiny, tmp_path)) for _ in range(2)]
    codes = sorted(command.wait() for command in both)
    # Where one was late by the whole of the other's run, it found the result.
    assert codes in ([0, 2], [0, 0]), [command.stderr for command in both]
    assert only_run(tmp_path).log_path.read_text().count("training on") == 1
    assert_same(only_run(tmp_path), whole)


# Ended without a result


def assert_row_without_result(run: RunFolder, state: str, reason: str) -> None:
    assert not run.result_path.exists()
    status = run.status()
    assert status is not None and status.state == state and reason in str(status.reason)
    (listed,) = list_runs(RunStore(run.path.parent))
    row = listed.as_json()
    assert row["status"] == state and row["reason"] == status.reason and "metrics" not in row


def test_loss_that_is_not_finite_ends_as_diverged(start: Starter, colours: Path, tiny: Path, tmp_path: Path) -> None:
    # Neither frozen statistics nor a head without norms hold back what a large weight in every layer multiplies up to.
    explosive = ["--method", "full", "--head", "linear"]
    for setting in ("statistics=frozen", "lr=10", "head_lr=10"):
        explosive += ["--set", setting]
    command = start(*run_arguments(colours, tiny, tmp_path, *explosive))
    assert command.wait() == 1, command.stderr
    run = only_run(tmp_path)
    status = run.status()
    assert status is not None and 1 < status.step <= STEPS
    reason = f"the loss was not finite at step {status.step}; try smaller learning rates (now lr=10 and head_lr=10)"
    assert one_line(command.stderr) == f"error: diverged: {reason}"
    assert_row_without_result(run, "diverged", reason)


# 32 pebibytes: beyond what a process can address, so that no allocator grants them on credit.
GREEDY = """
import torch
from methods.linear import Linear

class Greedy(Linear):
    name, summary, source = "greedy", "needs more memory than there is", "a test"

    def auxiliary_loss(self, labels):
        return torch.empty(2**55, dtype=torch.uint8).sum()
"""


def test_step_too_large_for_memory_ends_as_out_of_memory(
    start: Starter, colours: Path, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "greedy.py").write_text(GREEDY)
    plugin = ["--plugin", tmp_path / "greedy.py", "--method", "greedy"]
    command = start(*run_arguments(colours, tiny, tmp_path / "runs", *plugin))
    assert command.wait() == 1, command.stderr
    assert one_line(command.stderr).startswith("error: out of memory: out of memory after step 0; use a budget with")
    assert_row_without_result(only_run(tmp_path / "runs"), "out_of_memory", "out of memory after step 0")


def test_allocation_failures_of_torch_and_numpy_are_out_of_memory() -> None:
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
    [(0, "folder"), pytest.param(40_000, "checkpoint", marks=pytest.mark.exhaustive), (1_150_000, "delta")],
    ids=["for nothing", "for no checkpoint", "for no delta"],
)
def test_full_disk_is_a_one_line_error_and_the_run_resumes(
    start: Starter, colours: Path, tiny: Path, whole: RunFolder, small_disk: Path, left: int, where: str
) -> None:
    runs = small_disk / "runs"
    other = Path(shutil.copytree(whole.path, runs / ("0" * 16)))
    before = snapshot(other)
    step_costs.lend(runs)  # `start` does it, and they take up space
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - left))
    # Kept features would fill what is left as far as they can, at another moment each time.
    command = start(*run_arguments(colours, tiny, runs), "--cache-size", "0")
    assert command.wait() == 2, command.stderr
    run = runs / whole.fingerprint
    assert one_line(command.stderr).startswith(f"error: {run}: No space left on device; free some space")
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
