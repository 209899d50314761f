"""However a run is interrupted, with real processes and real signals, it ends as if it had not been."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cells.resolve import resolve
from harness.runs.folder import RunFolder
from harness.runs.store import RunStore
from tests.support.run_commands import (
    LONGER,
    Stopped,
    assert_same,
    curve,
    damage,
    finished,
    listed_state,
    only_run,
    request,
    step_of,
)
from tests.support.tiny_cell import STEPS, run_arguments
from tests.support.warm_start import Starter

# Killed


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["five", "ten"])
def test_run_killed_at_several_moments_ends_as_uninterrupted(
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


def test_lock_of_killed_process_with_live_workers_is_free(
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
def test_stopped_command_exits_130_with_one_line(stopped: Stopped, which: int) -> None:
    command = stopped.commands[which]
    assert command.wait() == 130
    assert "Traceback" not in command.stderr
    last = command.stderr.splitlines()[-1]
    assert re.fullmatch(r"interrupted: stopped after step \d+; the same command resumes", last), command.stderr


def test_stopped_run_has_a_checkpoint_of_its_last_step(stopped: Stopped) -> None:
    run = only_run(stopped.runs)
    status, checkpoint = run.status(), run.checkpoints.latest()
    assert status is not None and status.state == "interrupted" and 8 <= status.step < LONGER
    assert checkpoint is not None and checkpoint[0] == status.step
    assert status.reason == f"stopped after step {status.step}"
    assert not run.result_path.exists()


def test_stopped_run_resumes_and_ends_as_uninterrupted(
    start: Starter, stopped: Stopped, stopped_runs: Path, colours: Path, longer: Path, whole_longer: RunFolder
) -> None:
    assert f"resuming from step {step_of(stopped.first_checkpoint)}" in stopped.commands[1].stderr
    status = only_run(stopped_runs).status()
    command = start(*run_arguments(colours, longer, stopped_runs))
    assert command.wait() == 0
    assert status is not None and f"resuming from step {status.step}" in command.stderr
    assert_same(only_run(stopped_runs), whole_longer)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_run_stopped_while_evaluating_resumes_after_training(
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


# Damaged


def test_truncated_checkpoint_is_named_and_the_run_starts_over(
    start: Starter, stopped_runs: Path, colours: Path, longer: Path, whole_longer: RunFolder
) -> None:
    (checkpoint,) = only_run(stopped_runs).checkpoints.folder.iterdir()
    damage(checkpoint, "truncated")
    command = start(*run_arguments(colours, longer, stopped_runs))
    assert command.wait() == 0, command.stderr
    assert f"{checkpoint.with_suffix('.damaged')} is damaged" in command.stderr
    assert "resuming" not in command.stderr
    assert_same(only_run(stopped_runs), whole_longer)


def test_flipped_bit_in_a_checkpoint_falls_back_to_an_older_one(
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


def test_damaged_result_is_reported_and_recomputed(
    start: Starter, whole: RunFolder, colours: Path, tiny: Path, tmp_path: Path
) -> None:
    runs = Path(shutil.copytree(whole.path.parent, tmp_path / "runs"))
    damage(only_run(runs).result_path, "truncated")
    command = start(*run_arguments(colours, tiny, runs))
    assert command.wait() == 0, command.stderr
    assert f"{only_run(runs).result_path} is damaged; the run starts over" in command.stderr
    assert_same(only_run(runs), whole)
