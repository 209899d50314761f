"""Jobs on an existing Ray cluster: one Ray task each, which supervises the job's own process on its node.

The harness must be installed on the nodes, and `--runs`, `--data` and plugin files must be under the same paths there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from harness.errors import UserError
from harness.launch.job import Job, JobResult
from harness.launch.launcher import Launcher
from harness.launch.supervise import Stop, record, stopped, supervise
from harness.launch.worker import GRACE
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore

if TYPE_CHECKING:
    from ray import ObjectRef

_GIB = 2**30


@dataclass
class _Task:
    """A submitted job. `stopped`: it was asked to stop and is not restarted."""

    job: Job
    starts: int = 1
    stopped: bool = False


class RayLauncher(Launcher):
    """`jobs` at once: by default as many as the present nodes have resources for."""

    name: ClassVar[str] = "ray"
    defaults: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "address": ("auto", "HOST:PORT of the cluster's head node"),
        "cpus": (1, "CPU cores per job, and torch's threads"),
        "gpus": (None, "GPUs per job, also a fraction such as 0.5; default: 1 if the cluster has any"),
        "memory": (0.0, "GiB of memory that a job reserves; 0: none"),
        "retries": (3, "how often a job is restarted if its node or Ray worker dies"),
    }

    def __init__(self, jobs: int | None, device: str, options: Mapping[str, Any]):
        _check(device, options)
        self._ray = _connect(options["address"])
        try:
            self._jobs = jobs
            self._retries: int = options["retries"]
            self._cpus: int = options["cpus"]
            self._gpus = self._gpus_of_a_job(device, options["gpus"])
            self._memory = int(options["memory"] * _GIB)
            # Ray reuses a worker, and its imports, for the next job; not with GPUs, as a worker only sees those of its
            # first job.
            self._execute = self._ray.remote(
                num_cpus=self._cpus, num_gpus=self._gpus, memory=self._memory or None, max_retries=0
            )(_execute)
            self._tasks: dict[ObjectRef, _Task] = {}
            if not self.slots:
                wanted = f"cpus={self._cpus}, gpus={self._gpus:g} and memory={options['memory']:g}"
                raise UserError(
                    f"--launcher ray: no node of the cluster has {wanted} for a job; request less with "
                    "--launcher-set, or set --jobs if the cluster scales automatically"
                )
        except BaseException:
            self._ray.shutdown()
            raise

    def _gpus_of_a_job(self, device: str, requested: str | None) -> float:
        if requested is not None:
            return float(requested)
        if device == "auto":
            return float(any(node.get("GPU", 0) >= 1 for node in self._nodes()))
        return float(device == "cuda")

    def _nodes(self) -> list[dict[str, float]]:
        """The total resources of each live node."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    @property
    def slots(self) -> int:
        if self._jobs is not None:
            return self._jobs
        asked = {"CPU": self._cpus, "GPU": self._gpus, "memory": self._memory}
        asked = {resource: amount for resource, amount in asked.items() if amount}
        return sum(min(int(node.get(name, 0) / amount) for name, amount in asked.items()) for node in self._nodes())

    @property
    def free(self) -> int:
        return self.slots - len(self._tasks)

    def submit(self, job: Job) -> None:
        self._begin(_Task(job))

    def _begin(self, task: _Task) -> None:
        workers = task.job.options.workers
        options = replace(
            task.job.options,
            device="cuda" if self._gpus else "cpu",
            threads=self._cpus,
            workers=min(8, self._cpus // 2) if workers is None else workers,
        )
        job = replace(task.job, options=options)
        self._tasks[self._execute.remote(job, os.getcwd(), restarted=task.starts > 1)] = task

    def wait(self, seconds: float) -> list[JobResult]:
        if not self._tasks:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(self._tasks), timeout=seconds)
        if ready:  # wait for the first, then take all that are ready
            ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        return [result for ref in ready for result in self._results(ref, self._tasks.pop(ref))]

    def _results(self, ref: ObjectRef, task: _Task) -> list[JobResult]:
        """One result per cell of the task; none if the task is restarted."""
        errors = self._ray.exceptions
        job = task.job
        try:
            return self._ray.get(ref)
        except errors.TaskCancelledError:  # before it started, or after its job was stopped
            return [stopped(job.options, cell) for cell in job.cells]
        except errors.RayTaskError as error:  # for example, no process could be started
            outcome = Outcome(RunState.FAILED, f"{type(error.cause).__name__}: {error.cause}")
        except errors.RayError as error:
            if task.starts <= self._retries and not task.stopped:
                # The last time each cell runs alone: one of them may be the reason why the node dies.
                last = task.starts == self._retries
                for cells in [(cell,) for cell in job.cells] if last else [job.cells]:
                    self._begin(replace(task, job=replace(job, cells=cells), starts=task.starts + 1))
                return []
            reason = " ".join(str(error).split())[:300]
            if isinstance(error, errors.OutOfMemoryError):
                outcome = Outcome(RunState.OUT_OF_MEMORY, f"Ray: {reason}")
            else:
                outcome = Outcome(RunState.INTERRUPTED, f"Ray: {reason} (started {task.starts} times)")
        return [record(job.options, cell, outcome) for cell in job.cells]

    def stop(self, fingerprint: str) -> None:
        for ref, task in self._tasks.items():
            if not task.stopped and any(cell.fingerprint == fingerprint for cell in task.job.cells):
                task.stopped = True
                self._ray.cancel(ref)

    def close(self) -> None:
        for task in list(self._tasks.values()):
            self.stop(task.job.name)
        if self._tasks:  # jobs that have not written their checkpoints by then are killed with their workers
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=GRACE + 15)
            self._tasks.clear()
        self._ray.shutdown()


def _check(device: str, options: Mapping[str, Any]) -> None:
    """Raises `UserError`."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: Ray assigns the GPUs; use auto, cpu or cuda")
    for name, least in {"cpus": 1, "gpus": 0, "memory": 0, "retries": 0}.items():
        try:
            fits = options[name] is None or float(options[name]) >= least
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"--launcher-set {name}={options[name]}: use a number of at least {least}")


def _connect(address: str) -> Any:
    """The module `ray`, connected to the cluster. Raises `UserError`."""
    try:
        import ray
    except ImportError as error:
        raise UserError(
            '--launcher ray: ray is not installed; pip install "segmentation-tuning-harness[ray]"'
        ) from error
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    host, _, port = address.rpartition(":")
    # The nodes get this process's HARNESS_ variables: all processes that share a disk must agree on the lease's length.
    variables = {name: value for name, value in os.environ.items() if name.startswith("HARNESS_")}
    on_terminate = signal.getsignal(signal.SIGTERM)
    # Ray prints the last output of a dead node to stdout, and has no option against it.
    ray._private.worker._worker_logs_enabled = False
    try:
        if port.isdecimal() and "/" not in host:  # Ray itself would retry for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": variables} if variables else None,
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--launcher-set address={address}: no Ray cluster answers ({reason}); start one with `ray start --head`, "
            "or set the HOST:PORT of its head node"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray replaces it with its own
    return ray


# ---- on the node -----------------------------------------------------------------------------------------------------


def _execute(job: Job, folder: str, restarted: bool) -> list[JobResult]:
    """The body of a Ray task: waits for the job's process. To cancel it, Ray raises KeyboardInterrupt here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored on a node that was started in the background
    with contextlib.suppress(OSError):
        os.chdir(folder)  # paths of a request may be relative to it
    if restarted:
        _wait_for_locks(job)
    stop = Stop()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        results = pool.submit(supervise, job, stop)
        while not results.done():
            try:
                concurrent.futures.wait([results], timeout=0.2)  # Ray's interrupt does not wake up a wait
            except KeyboardInterrupt:
                stop()
    return results.result()


def _wait_for_locks(job: Job) -> None:
    """Wait for jobs whose Ray worker died: they write their checkpoints before they release their locks."""
    store = RunStore(job.options.runs)
    runs = [store.by_fingerprint(cell.fingerprint) for cell in job.cells]
    end = time.monotonic() + GRACE
    while any(store.lock_owner(run) is not None for run in runs) and time.monotonic() < end:
        time.sleep(0.2)
