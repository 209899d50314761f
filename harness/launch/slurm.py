"""Jobs on Slurm, through submitit: one Slurm job each, which watches the job's own process on its node.

The harness must be installed on the nodes, and `--runs`, `--data` and plugin files be under the same paths there.
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
from harness.launch.supervise import GRACE, Stop, of_members, recorded, stopped, supervise

if TYPE_CHECKING:
    import submitit

QUEUED = 32
"""How many jobs are in Slurm's hands at once where `--jobs` does not say."""
POLL_SECONDS = 1.0
"""Between two looks at the results on disk."""
LOOK_SECONDS = 15.0
"""Between two questions to Slurm, one for all jobs. A result comes before the job's end, but a disk may be slow to show
it: without one, a job is lost when Slurm has called it over twice."""

_OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


@dataclass
class _Submitted:
    job: Job
    handle: submitit.Job[list[JobResult]]
    stopped: bool = False
    over: int = 0
    """How often Slurm has called it over."""
    state: str = "UNKNOWN"


class SlurmLauncher(Launcher):
    """`jobs` at once in the queue or running. submitit's files are in `.launch/slurm` under `--runs`."""

    name: ClassVar[str] = "slurm"
    defaults: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "cluster": ("slurm", "local: processes of this machine in place of Slurm jobs, to try things out"),
        "partition": (None, "Slurm's, as account, qos and constraint; default Slurm's own"),
        "account": (None, "to charge"),
        "qos": (None, "quality of service"),
        "constraint": (None, "features that a node must have"),
        "gpus": (0, "GPUs of a job"),
        "cpus": (1, "CPU cores of a job, and torch's threads"),
        "mem_gb": (0.0, "GB of memory of a job; 0 is Slurm's own default"),
        "minutes": (240, "time limit of one Slurm job"),
        "requeues": (3, "how often a job that reaches it is queued again, to go on from its checkpoint"),
        "setup": (None, "a shell command before the job, such as `module load cuda`"),
    }

    def __init__(self, jobs: int | None, device: str, options: Mapping[str, Any]):
        for name, least in {"gpus": 0, "cpus": 1, "mem_gb": 0, "minutes": 1, "requeues": 0}.items():
            if options[name] < least:
                raise UserError(f"--launcher-set {name}={options[name]}: give a number of at least {least}")
        _check_installed(options["cluster"])
        self._jobs = jobs or (1 if options["cluster"] == "local" else QUEUED)
        self._device = device
        self._options = options
        self._submitted: list[_Submitted] = []
        self._refused: list[JobResult] = []
        self._accepted = False
        self._looked = time.monotonic()

    @property
    def slots(self) -> int:
        return self._jobs

    @property
    def free(self) -> int:
        return self._jobs - len(self._submitted)

    def submit(self, job: Job) -> None:
        """Raises `UserError` where not even the first job is accepted."""
        from submitit.core.utils import FailedJobError

        placed = replace(job, device=self._device, threads=self._options["cpus"])
        try:
            handle = self._executor(job.runs / ".launch" / "slurm").submit(Task(), placed)
        except FailedJobError as error:
            reason = f"sbatch: {' '.join(str(error).split())[-300:]}"
            if not self._accepted:
                raise UserError(f"--launcher slurm: {reason}; see --launcher-set") from error
            self._refused += [JobResult(cell, "interrupted", reason) for cell in job.members]
        else:
            self._accepted = True
            self._submitted.append(_Submitted(job, handle))

    def _executor(self, folder: Path) -> submitit.AutoExecutor:
        import submitit

        given = self._options
        executor = submitit.AutoExecutor(folder, cluster=given["cluster"], slurm_max_num_timeout=given["requeues"])
        wanted = {
            "name": "harness",
            "timeout_min": given["minutes"],
            "cpus_per_task": given["cpus"],
            "gpus_per_node": given["gpus"] or None,
            "mem_gb": given["mem_gb"] or None,
            "slurm_partition": given["partition"],
            "slurm_account": given["account"],
            "slurm_qos": given["qos"],
            "slurm_constraint": given["constraint"],
            "slurm_setup": given["setup"] and [given["setup"]],
            "slurm_signal_delay_s": round(2 * GRACE),
        }
        executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None})
        return executor

    def wait(self, seconds: float) -> list[JobResult]:
        end = time.monotonic() + seconds
        while True:
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self._look()
            over = [submitted for submitted in self._submitted if self._is_over(submitted)]
            self._submitted = [submitted for submitted in self._submitted if submitted not in over]
            ended = self._refused + [one for submitted in over for one in _ended(submitted)]
            self._refused = []
            left = end - time.monotonic()
            if ended or left <= 0:
                return ended
            time.sleep(min(POLL_SECONDS, left))

    def _is_over(self, submitted: _Submitted) -> bool:
        if self._options["cluster"] == "local":
            submitted.state = submitted.handle.state
            return submitted.handle.done()
        return submitted.handle.paths.result_pickle.exists() or submitted.over >= 2

    def _look(self) -> None:
        """By `squeue`, for `sacct`, which submitit would ask, knows nothing where Slurm keeps no accounts."""
        self._looked = time.monotonic()
        if self._options["cluster"] == "local":
            return
        command = ["squeue", "--me", "--noheader", "--states=all", "--format=%A %T"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            return  # such as a controller that is away for a while
        states = dict(line.split() for line in answer.stdout.splitlines())
        for submitted in self._submitted:
            submitted.state = states.get(submitted.handle.job_id, "gone")
            submitted.over = submitted.over + 1 if submitted.state in (*_OVER, "gone") else 0

    def stop(self, fingerprint: str) -> None:
        for submitted in self._submitted:
            if not submitted.stopped and any(cell.fingerprint == fingerprint for cell in submitted.job.members):
                submitted.stopped = True
                submitted.handle.cancel(check=False)

    def close(self) -> None:
        for submitted in self._submitted:
            self.stop(submitted.job.fingerprint)
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
        raise UserError(f"--launcher-set cluster={cluster}: give slurm or local")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--launcher slurm: `sbatch` is not on PATH; start it on a login node of the cluster")
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it reports each look at the queue that fails


def _ended(submitted: _Submitted) -> list[JobResult]:
    """What a job that is over returned or, where its node died, what its run folders are told."""
    job, handle = submitted.job, submitted.handle
    if handle.paths.result_pickle.exists():
        try:
            return of_members(job, handle.result())
        except Exception:  # submitit's own, or that of a pickle that cannot be read
            state = "FAILED"
    elif submitted.stopped:  # before it began, or before it could answer
        return [stopped(cell) for cell in job.members]
    else:
        state = submitted.state
    reason = f"Slurm job {handle.job_id} ended without a result: {state}; see {handle.paths.stderr}"
    return [recorded(cell, reason, "interrupted") for cell in job.members]


# ---- on the node -----------------------------------------------------------------------------------------------------


class Task:
    """The body of a Slurm job. Signals come to the main thread, which does nothing but to wait.

    SIGTERM (`scancel`, or a preemption that leaves time) and SIGINT (submitit's local cancel) end the job where it is.
    submitit calls `checkpoint` before the time limit: the job ends likewise, and goes on when it is begun anew.
    """

    def __call__(self, job: Job) -> list[JobResult]:
        self._stop = Stop()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            self._ended = pool.submit(supervise, job, self._stop)
            return self._ended.result()

    def checkpoint(self, job: Job) -> submitit.helpers.DelayedSubmission:
        from submitit.helpers import DelayedSubmission

        self._stop()
        self._ended.result()
        return DelayedSubmission(Task(), job)
