"""Finished and stopped runs of the tiny cell, which tests of whole runs compare with."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from harness.runs.folder import RunFolder
from tests.support.run_commands import LONGER, Stopped, curve, finished, only_run
from tests.support.tiny_cell import make_budget, make_dataset, run_arguments
from tests.support.warm_start import Starter


@pytest.fixture(scope="session")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_budget(tmp_path_factory.mktemp("budgets") / "longer.yaml", steps=LONGER)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset without ignored pixels: every forward pass and every process has equally many labels."""
    return make_dataset(tmp_path_factory.mktemp("data") / "labelled", ignored_rows=0)


@pytest.fixture(scope="session")
def whole_longer(start: Starter, colours: Path, longer: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of the longer budget that nothing interrupted. Not to be changed."""
    return finished(start, colours, longer, tmp_path_factory.mktemp("whole-longer"))


@pytest.fixture(scope="session")
def stopped(start: Starter, colours: Path, longer: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Stopped by SIGTERM, resumed, stopped by Ctrl-C. Not to be changed."""
    runs, checkpoints = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("checkpoints")
    commands = []
    for number, workers, steps in ((signal.SIGTERM, 0, 3), (signal.SIGINT, 1, 8)):
        command = start(*run_arguments(colours, longer, runs, "--workers", str(workers)))
        command.wait_until(lambda steps=steps: len(curve(runs)) >= steps)
        command.signal_group(number)
        command.wait()
        commands.append(command)
        for path in only_run(runs).checkpoints.folder.glob("*.pt"):
            shutil.copy(path, checkpoints)
    return Stopped(runs, min(checkpoints.iterdir()), (commands[0], commands[1]))


@pytest.fixture
def stopped_runs(stopped: Stopped, tmp_path: Path) -> Path:
    """A copy of the stopped run's `--runs`, which may be changed; its curve ends in the half line of a kill."""
    runs = Path(shutil.copytree(stopped.runs, tmp_path / "runs"))
    with only_run(runs).curve_path.open("a") as handle:
        handle.write('{"step": 29, "lo')
    return runs
