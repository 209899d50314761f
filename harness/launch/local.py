"""Jobs on this machine: one process each, one slot per GPU or group of cores."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from harness.errors import UserError
from harness.launch.job import Job, JobResult
from harness.launch.launcher import Launcher
from harness.launch.supervise import Stop, record, supervise
from harness.runs.state import Outcome, RunState
from harness.util.cores import cores, threads_each


@dataclass(frozen=True)
class Slot:
    """The resources of one job. `cores` empty: all; `threads` None: torch's own choice."""

    device: str
    cores: tuple[int, ...] = ()
    threads: int | None = None


class LocalLauncher(Launcher):
    """`jobs` at once: by default one per GPU, or one with all cores."""

    name: ClassVar[str] = "local"

    def __init__(self, jobs: int | None, device: str, options: Mapping[str, Any]):
        self._slots = make_slots(jobs, device)
        self._free = list(self._slots)
        self._stops: dict[str, Stop] = {}
        self._finished: queue.SimpleQueue[tuple[list[JobResult], Slot]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def slots(self) -> int:
        return len(self._slots)

    def submit(self, job: Job) -> None:
        slot = self._free.pop(0)
        options = replace(job.options, device=slot.device, cores=slot.cores, threads=slot.threads)
        stop = Stop()
        self._stops |= {cell.fingerprint: stop for cell in job.cells}
        thread = threading.Thread(target=self._watch, args=(replace(job, options=options), stop, slot), name=job.name)
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        thread.start()

    def _watch(self, job: Job, stop: Stop, slot: Slot) -> None:
        try:
            results = supervise(job, stop)
        except Exception as error:  # for example, no process could be started
            failed = Outcome(RunState.FAILED, f"{type(error).__name__}: {error}")
            results = [record(job.options, cell, failed) for cell in job.cells]
        self._finished.put((results, slot))

    def wait(self, seconds: float) -> list[JobResult]:
        results: list[JobResult] = []
        try:
            while True:
                found, slot = self._finished.get(timeout=0 if results else seconds)
                self._free.append(slot)
                self._free.sort(key=self._slots.index)
                for result in found:
                    self._stops.pop(result.cell.fingerprint, None)
                results += found
        except queue.Empty:
            return results

    def stop(self, fingerprint: str) -> None:
        if fingerprint in self._stops:
            self._stops[fingerprint]()

    def close(self) -> None:
        for stop in list(self._stops.values()):
            stop()
        for thread in self._threads:
            thread.join()


def make_slots(jobs: int | None, device: str) -> list[Slot]:
    """One slot per concurrent job. GPUs are assigned in turn; cores are divided into equal groups.

    Raises `UserError` for more jobs than cores.
    """
    devices = [f"cuda:{index}" for index in visible_gpus()] if device in ("auto", "cuda") else []
    if not devices and device not in ("auto", "cpu"):
        devices = [device]
    count = jobs or len(devices) or 1
    if count == 1:
        return [Slot(devices[0] if devices else "cpu")]
    threads = threads_each(count)
    if devices:  # a job on a GPU also has processes that load data: it is not held to its cores
        return [Slot(devices[index % len(devices)], threads=threads) for index in range(count)]
    available = cores()
    each = len(available) // count
    if not each:
        raise UserError(f"--jobs {count}: there are only {len(available)} cores; use at most one job per core")
    return [Slot("cpu", tuple(available[i * each : (i + 1) * each]), threads) for i in range(count)]


def visible_gpus() -> list[int]:
    """Indices of the GPUs that torch would see, without importing torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return list(range(len([name for name in chosen.split(",") if name.strip() not in ("", "-1")])))
    driver = Path("/proc/driver/nvidia/gpus")
    return list(range(sum(1 for _ in driver.iterdir()))) if driver.is_dir() else []
