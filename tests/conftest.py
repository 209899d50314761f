"""Fixtures for tests of whole runs: one tiny dataset, one tiny budget, and no settings of the developer's shell."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.runs.folder import RunFolder
from harness.util.fork_server import fork_context
from tests.support import step_costs
from tests.support.made_once import made_once
from tests.support.run_commands import only_run
from tests.support.tiny_cell import harness, make_budget, make_dataset, run_arguments
from tests.support.warm_start import Starter, fork_the_fork_server

TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Handle Ctrl-C: a shell ignores it in background jobs, and child processes of the tests would inherit that."""
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the environment of this process
        os.environ[step_costs.VARIABLE] = folder = tempfile.mkdtemp(prefix="step-costs")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = (
    "test_compare", "test_locks", "test_resume", "test_execute", "test_equality", "test_ray_launcher",
    "test_supervise", "test_reuse", "test_plugins", "test_mirror", "test_slurm_launcher", "test_contract",
    "test_report", "test_benchmarks", "test_search", "test_browser", "test_weights", "test_optuna_storage",
    "test_tune_head", "test_collect", "test_plots", "test_stores",
)  # fmt: skip
"""Slow files that mostly wait for processes: started first, so that none runs alone at the end, and while there is
little to copy for those that fork: after the tests of networks a worker holds several GB."""


PROCESSES = (
    "benchmarks/", "contract/", "launch/", "studies/", "tracking/", "cells/test_compatibility", "cells/test_plugins",
    "cli/test_main", "cli/test_run", "data/test_catalog", "deploy/", "docs/test_site",
    "engine/test_equality", "engine/test_execute", "engine/test_resume", "features/test_reuse", "features/test_store",
    "methods/test_every_method", "methods/test_peft_family", "methods/test_spm", "models/test_attach",
    "models/test_families", "models/test_normalisation", "models/test_registration", "models/test_stage_outputs",
    "models/test_weights", "reports/test_browser", "reports/test_calibration",
    "reports/test_plots", "reports/test_report.", "runs/test_locks", "test_public_api",
)  # fmt: skip
"""Tests that start processes or servers, train or build many networks or simulate for long: not in `make test-fast`."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports and collection leave little garbage, and looking for it takes a fifth of their time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {stem: place for place, stem in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.path.relative_to(TESTS).as_posix().startswith(PROCESSES):
            item.add_marker(pytest.mark.processes)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exempt what was imported from garbage collection: it stays to the end, and forked processes need not copy it.

    Then start the server that jobs of this process are forked from, before any test can leave something in it.
    """
    gc.freeze()
    gc.enable()
    if any(item.get_closest_marker("processes") for item in session.items):
        fork_the_fork_server()
        fork_context("harness.launch.preload")


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight train and five test images of 64×64, three classes by colour, some pixels ignored. Not to be changed."""
    return make_dataset(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A budget of twelve steps of four crops of 32×32."""
    return make_budget(tmp_path_factory.mktemp("budgets") / "tiny.yaml")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all workers of the session."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def start(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """`harness` in a process of its own."""
    starter = Starter(tmp_path_factory.mktemp("outputs"), shared / "starter")
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def whole(shared: Path) -> RunFolder:
    """A finished run of the tiny cell, by the command itself from a cold start. Not to be changed."""

    def make(folder: Path) -> None:
        dataset, budget = make_dataset(folder / "colours"), make_budget(folder / "tiny.yaml")
        done = harness(*run_arguments(dataset, budget, folder / "runs"))
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.splitlines()[-1]) == only_run(folder / "runs").path
        step_costs.keep(folder / "runs")

    return only_run(made_once(shared / "whole", make) / "runs")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs"]
    try:
        mounted = subprocess.run(["mount", *options, str(disk)], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
