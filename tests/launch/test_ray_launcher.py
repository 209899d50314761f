"""Jobs on a real Ray cluster of a head and two nodes on this machine, and the death of each part."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.errors import UserError
from harness.launch.choice import LauncherChoice
from harness.launch.job import Job
from harness.launch.ray import RayLauncher
from tests.support.tiny_jobs import (
    SLOW,
    Cells,
    all_ends,
    as_one,
    executions,
    folder,
    only_end,
    results_of,
    run_all,
    start_launcher,
    state,
    steps_done,
    wait_until,
)

pytest.importorskip("ray")
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster`; a node is its processes. Sockets want a short path."""
    from ray.cluster_utils import Cluster

    on_terminate = signal.getsignal(signal.SIGTERM)
    place = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    # Dead nodes are noticed within seconds. Workers have normal priority: at Ray's own niceness of 15 a job starves
    # beside the other tests.
    health = {"initial_delay_ms": 500, "period_ms": 500, "failure_threshold": 4}
    system = {"worker_niceness": 0, **{f"health_check_{name}": value for name, value in health.items()}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", place)
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                **NODE,
                "num_cpus": 0,
                "include_dashboard": False,
                "include_log_monitor": False,
                "_system_config": system,
            },
        )
        cluster.add_node(**NODE)
        cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        yield cluster
        cluster.shutdown()
    signal.signal(signal.SIGTERM, on_terminate)  # the cluster has set another
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def launcher(cluster: Any) -> Iterator[RayLauncher]:
    with LauncherChoice("ray", settings={"address": cluster.address}).open() as launcher:
        assert isinstance(launcher, RayLauncher)
        yield launcher


def process_of(job: Job) -> psutil.Process:
    """The process of a job, once it has made some steps."""
    wait_until(lambda: steps_done(job) > 3, what=job.name)
    return psutil.Process(folder(job).status().pid)


def kill_node_of(process: psutil.Process, cluster: Any) -> None:
    """`kill -9` of the Ray process that is the node; its workers have to notice."""
    above = {parent.pid for parent in process.parents()}
    for node in cluster.worker_nodes:
        raylet = node.all_processes["raylet"][0].process
        if raylet.pid in above:
            raylet.kill()
            raylet.wait()
            return
    raise AssertionError(f"{process} runs on no node")


def options(**settings: str) -> dict[str, Any]:
    return RayLauncher.read_options(settings)


def test_error_without_a_cluster_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address in ("auto", "127.0.0.1:9"):
        with pytest.raises(UserError, match=rf"address={address}: no Ray cluster answers \(.*\); .*`ray start --head`"):
            RayLauncher(None, "auto", options(address=address))


def test_error_without_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"ray is not installed; pip install \"segmentation-tuning-harness\[ray\]\""):
        RayLauncher(None, "auto", options())


@pytest.mark.parametrize("setting", ["cpus=0", "gpus=-1", "gpus=many", "memory=-0.5", "retries=-1"])
def test_option_out_of_range_is_named(setting: str) -> None:
    name, _, value = setting.partition("=")
    with pytest.raises(UserError, match=f"--launcher-set {setting}: use a number of at least"):
        RayLauncher(None, "auto", options(**{name: value}))


def test_device_index_is_refused() -> None:
    with pytest.raises(UserError, match="--device cuda:1: Ray assigns the GPUs"):
        RayLauncher(None, "cuda:1", options())


def test_job_too_large_for_every_node_is_refused(cluster: Any) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(UserError, match=r"no node of the cluster has cpus=2, gpus=0 and memory=0 for a job"):
        RayLauncher(None, "auto", options(address=cluster.address, cpus="2"))
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL


def test_two_nodes_give_the_results_of_the_local_launcher(
    launcher: RayLauncher, cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    jobs = [cells.job(tmp_path, seed=seed, threads=None) for seed in range(2)]
    second = cells.job(tmp_path, "linear", seed=1, threads=None)
    assert launcher.slots == launcher.free == 2
    ended = run_all(launcher, [jobs[0], as_one(jobs[1], second)])
    assert [state(ended[job.name]) for job in (*jobs, second)] == ["done"] * 3, ended
    assert [executions(job) for job in (*jobs, second)] == [(1, 0)] * 3
    assert [results_of(job) for job in jobs] == [undisturbed[job.name] for job in jobs]


def test_stopped_job_resumes_from_its_checkpoint(
    launcher: RayLauncher, longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    job = longer_cells.job(tmp_path, SLOW)
    launcher.submit(job)
    process_of(job)
    launcher.stop(job.name)
    assert state(only_end(launcher)) == "interrupted"
    status = folder(job).status()
    assert status is not None and status.reason == f"stopped after step {status.step}"
    launcher.submit(job)
    assert state(only_end(launcher)) == "done"
    assert executions(job) == (2, 1)
    assert results_of(job) == undisturbed[job.name]


def test_waiting_job_can_be_stopped(launcher: RayLauncher, longer_cells: Cells, tmp_path: Path) -> None:
    running = [longer_cells.job(tmp_path, SLOW, seed=seed) for seed in range(2)]
    waiting = longer_cells.job(tmp_path, SLOW, seed=2)
    for job in (*running, waiting):
        launcher.submit(job)
    for job in running:
        process_of(job)
    launcher.stop(waiting.name)
    assert only_end(launcher).cell == waiting.cells[0]
    assert not folder(waiting).path.exists()
    for job in running:
        launcher.stop(job.name)
        assert state(only_end(launcher)) == "interrupted"


def test_job_of_a_killed_node_resumes_on_another(
    launcher: RayLauncher,
    cluster: Any,
    longer_cells: Cells,
    undisturbed: dict[str, dict],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    jobs = [longer_cells.job(tmp_path, SLOW, seed=seed) for seed in range(2)]
    second = longer_cells.job(tmp_path, "linear")
    for job in (as_one(jobs[0], second), jobs[1]):
        launcher.submit(job)
    process_of(jobs[1])
    kill_node_of(process_of(jobs[0]), cluster)
    ended = all_ends(launcher, 3)
    assert [state(ended[job.name]) for job in (*jobs, second)] == ["done"] * 3, ended
    assert [executions(job) for job in (*jobs, second)] == [(2, 1), (1, 0), (2, 1)]
    assert results_of(jobs[0]) == undisturbed[jobs[0].name]
    wait_until(lambda: launcher.slots == 1)
    assert capfd.readouterr() == ("", "")


DRIVER = """
import pickle, sys
from harness.launch.ray import RayLauncher
address, job = pickle.loads(bytes.fromhex(sys.argv[1]))
with RayLauncher(None, "auto", RayLauncher.read_options({"address": address})) as launcher:
    launcher.submit(job)
    while not launcher.wait(1):
        pass
"""


@pytest.mark.exhaustive
def test_job_of_a_killed_driver_ends_and_another_finishes_it(
    launcher: RayLauncher, cluster: Any, longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    job = longer_cells.job(tmp_path, SLOW)
    driver = start_launcher(DRIVER, pickle.dumps((cluster.address, job)), RAY_TMPDIR=os.environ["RAY_TMPDIR"])
    try:
        process = process_of(job)
    finally:
        driver.kill()
        driver.wait()
    process.wait(timeout=900)
    status = folder(job).status()
    assert status is not None and status.state == "interrupted"
    launcher.submit(job)
    assert state(only_end(launcher)) == "done"
    assert executions(job) == (2, 1)
    assert results_of(job) == undisturbed[job.name]


def test_closing_stops_running_jobs(launcher: RayLauncher, longer_cells: Cells, tmp_path: Path) -> None:
    job = longer_cells.job(tmp_path, SLOW)
    launcher.submit(job)
    process = process_of(job)
    launcher.close()
    assert not process.is_running()
    status = folder(job).status()
    assert status is not None and status.state == "interrupted"
