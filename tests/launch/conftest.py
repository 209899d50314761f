"""Jobs for the tests of launchers, and how they end when nothing disturbs them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.launch.local import LocalLauncher
from tests.support.made_once import made_once
from tests.support.tiny_cell import make_budget
from tests.support.tiny_jobs import PLUGIN, SLOW, Cells, loaded, results_of, run_all, state

LONGER = 40
"""Steps of runs that are disturbed."""


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "troublesome.py"
    path.write_text(PLUGIN, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cells(colours: Path, tiny: Path, plugin: Path) -> Cells:
    return Cells(colours, tiny, plugin)


@pytest.fixture(scope="session")
def longer_cells(colours: Path, plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return Cells(colours, make_budget(tmp_path_factory.mktemp("budgets") / "longer.yaml", steps=LONGER), plugin)


@pytest.fixture(scope="module", autouse=True)
def known(plugin: Path) -> Iterator[None]:
    with loaded(plugin):
        yield


@pytest.fixture(scope="session")
def undisturbed(cells: Cells, longer_cells: Cells, plugin: Path, shared: Path) -> dict[str, dict]:
    """Results of the cells that tests disturb, by fingerprint, from the local launcher with one thread a job."""

    def make(runs: Path) -> None:
        with loaded(plugin), LocalLauncher(min(2, len(os.sched_getaffinity(0))), "cpu", {}) as launcher:
            jobs = [cells.job(runs, seed=seed) for seed in range(2)] + [longer_cells.job(runs, SLOW)]
            ended = run_all(launcher, jobs)
        assert {state(result) for result in ended.values()} == {"done"}, ended
        (runs / "results.pickle").write_bytes(pickle.dumps({job.name: results_of(job) for job in jobs}))

    return pickle.loads((made_once(shared / "undisturbed", make) / "results.pickle").read_bytes())
