"""Jobs on Slurm, through submitit: one Slurm job each, which supervises the job's own process on its node.

The harness must be installed on the nodes, and `--runs`, `--data` and plugin files must be under the same paths there.
"""

from __future__ import annotations

import concurrent.futures
import logging
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.errors import UserError
from harness.launch.job import Job, JobResult
from harness.launch.launcher import Launcher
from harness.launch.supervise import Stop, record, stopped, supervise
from harness.launch.worker import GRACE
from harness.runs.state import Outcome, RunState

if TYPE_CHECKING:
    import submitit

QUEUED = 32
"""How many jobs are queued or running in Slurm at once without `--jobs`."""
POLL_SECONDS = 1.0
"""Seconds between two checks for results on disk."""
QUEUE_SECONDS = 15.0
"""Seconds between two calls of `squeue`, one for all jobs. A result is written before the job ends, but may appear late
on a network disk: a job without one is lost when Slurm has reported its end twice."""

_ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


@dataclass
class _Submitted:
    job: Job
    handle: submitit.Job[list[JobResult]]
    stopped: bool = False
    end_reports: int = 0
    """How often Slurm has reported the end of the job."""
    state: str = "UNKNOWN"


class SlurmLauncher(Launcher):
    """At most `jobs` queued or running at once. submitit's files are in `.launch/slurm` under `--runs`."""

    name: ClassVar[str] = "slurm"
    defaults: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "cluster": ("slurm", "slurm, or local: processes on this machine instead of Slurm jobs, for testing"),
        "partition": (None, "partition; default: Slurm's own, as for account, qos and constraint"),
        "account": (None, "account to charge"),
        "qos": (None, "quality of service"),
        "constraint": (None, "features that a node must have"),
        "gpus": (0, "GPUs per job"),
        "cpus": (1, "CPU cores per job, and torch's threads"),
        "mem_gb": (0.0, "GB of memory per job; 0: Slurm's own default"),
        "minutes": (240, "time limit of one Slurm job"),
        "requeues": (3, "how often a job that reaches its time limit is requeued, to resume from its checkpoint"),
        "setup": (None, "a shell command before the job, such as `module load cuda`"),
    }

    def __init__(self, jobs: int | None, device: str, options: Mapping[str, Any]):
        for name, least in {"gpus": 0, "cpus": 1, "mem_gb": 0, "minutes": 1, "requeues": 0}.items():
            if options[name] < least:
                raise UserError(f"--launcher-set {name}={options[name]}: use a number of at least {least}")
        _check_installed(options["cluster"])
        self._jobs = jobs or (1 if options["cluster"] == "local" else QUEUED)
        self._device = device
        self._options = options
        self._submitted: list[_Submitted] = []
        self._refused: list[JobResult] = []
        self._accepted = False
        self._queue_read = time.monotonic()

    @property
    def slots(self) -> int:
        return self._jobs

    @property
    def free(self) -> int:
        return self._jobs - len(self._submitted)

    def submit(self, job: Job) -> None:
        """Raises `UserError` if the first job is not accepted."""
        from submitit.core.utils import FailedJobError

        options = replace(job.options, device=self._device, threads=self._options["cpus"])
        try:
            executor = self._executor(options.runs / ".launch" / "slurm")
            handle = executor.submit(Task(), replace(job, options=options))
        except FailedJobError as error:
            reason = f"sbatch: {' '.join(str(error).split())[-300:]}"
            if not self._accepted:
                raise UserError(f"--launcher slurm: {reason}; see --launcher-set") from error
            self._refused += [JobResult(cell, Outcome(RunState.INTERRUPTED, reason)) for cell in job.cells]
        else:
            self._accepted = True
            self._submitted.append(_Submitted(job, handle))

    def _executor(self, folder: Path) -> submitit.AutoExecutor:
        import submitit

        chosen = self._options
        executor = submitit.AutoExecutor(folder, cluster=chosen["cluster"], slurm_max_num_timeout=chosen["requeues"])
        wanted = {
            "name": "harness",
            "timeout_min": chosen["minutes"],
            "cpus_per_task": chosen["cpus"],
            "gpus_per_node": chosen["gpus"] or None,
            "mem_gb": chosen["mem_gb"] or None,
            "slurm_partition": chosen["partition"],
            "slurm_account": chosen["account"],
            "slurm_qos": chosen["qos"],
            "slurm_constraint": chosen["constraint"],
            "slurm_setup": chosen["setup"] and [chosen["setup"]],
            "slurm_signal_delay_s": round(2 * GRACE),
        }
        executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None})
        return executor

    def wait(self, seconds: float) -> list[JobResult]:
        end = time.monotonic() + seconds
        while True:
            if time.monotonic() - self._queue_read > QUEUE_SECONDS:
                self._read_queue()
            ended = [submitted for submitted in self._submitted if self._has_ended(submitted)]
            self._submitted = [submitted for submitted in self._submitted if submitted not in ended]
            results = self._refused + [result for submitted in ended for result in _results(submitted)]
            self._refused = []
            left = end - time.monotonic()
            if results or left <= 0:
                return results
            time.sleep(min(POLL_SECONDS, left))

    def _has_ended(self, submitted: _Submitted) -> bool:
        if self._options["cluster"] == "local":
            submitted.state = submitted.handle.state
            return submitted.handle.done()
        return submitted.handle.paths.result_pickle.exists() or submitted.end_reports >= 2

    def _read_queue(self) -> None:
        """Ask `squeue`: `sacct`, which submitit would call, fails where Slurm has no accounting."""
        self._queue_read = time.monotonic()
        if self._options["cluster"] == "local":
            return
        command = ["squeue", "--me", "--noheader", "--states=all", "--format=%A %T"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            return  # for example, the controller does not answer
        states = dict(line.split() for line in answer.stdout.splitlines())
        for submitted in self._submitted:
            submitted.state = states.get(submitted.handle.job_id, "gone")
            has_ended = submitted.state in (*_ENDED, "gone")
            submitted.end_reports = submitted.end_reports + 1 if has_ended else 0

    def stop(self, fingerprint: str) -> None:
        for submitted in self._submitted:
            if not submitted.stopped and any(cell.fingerprint == fingerprint for cell in submitted.job.cells):
                submitted.stopped = True
                submitted.handle.cancel(check=False)

    def close(self) -> None:
        for submitted in self._submitted:
            self.stop(submitted.job.name)
        end = time.monotonic() + GRACE + 15
        while self._submitted and time.monotonic() < end:
            self.wait(POLL_SECONDS)


def _check_installed(cluster: str) -> None:
    """Raises `UserError`."""
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise UserError(
            '--launcher slurm: submitit is not installed; pip install "segmentation-tuning-harness[slurm]"'
        ) from error
    if cluster not in ("slurm", "local"):
        raise UserError(f"--launcher-set cluster={cluster}: use slurm or local")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--launcher slurm: `sbatch` is not on PATH; run the command on a login node of the cluster")
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it logs each call of squeue that fails


def _results(submitted: _Submitted) -> list[JobResult]:
    """The results of a job that has ended; if its node died, the run folders get a reason."""
    job, handle = submitted.job, submitted.handle
    if handle.paths.result_pickle.exists():
        try:
            return handle.result()
        except Exception:  # submitit's own, or that of a pickle that cannot be read
            state = "FAILED"
    elif submitted.stopped:  # before it started, or before it could answer
        return [stopped(job.options, cell) for cell in job.cells]
    else:
        state = submitted.state
    reason = f"Slurm job {handle.job_id} ended without a result: {state}; see {handle.paths.stderr}"
    return [record(job.options, cell, Outcome(RunState.INTERRUPTED, reason)) for cell in job.cells]


# ---- on the node -----------------------------------------------------------------------------------------------------


class Task:
    """The body of a Slurm job. The main thread only waits and receives the signals.

    SIGTERM (`scancel`, or a preemption with notice) and SIGINT (submitit's local cancel) stop the job. submitit calls
    `checkpoint` before the time limit: the job stops as well, and resumes when it is restarted.
    """

    def __call__(self, job: Job) -> list[JobResult]:
        self._stop = Stop()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            self._results = pool.submit(supervise, job, self._stop)
            return self._results.result()

    def checkpoint(self, job: Job) -> submitit.helpers.DelayedSubmission:
        from submitit.helpers import DelayedSubmission

        self._stop()
        self._results.result()
        return DelayedSubmission(Task(), job)
