"""Jobs of tiny cells for launchers: good ones, slow ones, and ones that fail in every way."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.numpy import load_file

from harness.cells import plugins
from harness.cells.resolve import Request, resolve
from harness.engine.options import ExecutionOptions
from harness.launch.job import Job, JobCell, JobResult
from harness.launch.launcher import Launcher
from harness.method import methods
from harness.runs.folder import RunFolder
from harness.runs.metrics import load_confusions
from harness.runs.state import RunState
from harness.runs.store import RunStore
from tests.support import step_costs
from tests.support.tiny_cell import environment

PLUGIN = '''\
"""Methods that train no tensor of their own, and at the fifth step do as they are called."""

import ctypes
import os
import signal
import time

import torch
from torch import nn

from harness import method
from harness.method import Method


class Deed(nn.Module):
    def __init__(self, do):
        super().__init__()
        self.do, self.steps = do, 0

    def forward(self, feature_map):
        if self.training and feature_map.device.type == "cpu":  # not where operations are counted, without data
            self.steps += 1
            self.do(self.steps)
        return feature_map


class _Troublesome(Method):
    source = "a test"

    class Hyperparameters(method.Hyperparameters):
        pass

    def attach(self, backbone, num_classes):
        backbone.insert_after_stage(0, Deed(lambda step: self.do() if step == 5 else None))

    def parameter_count(self, backbone, num_classes):
        return 0


class Raises(_Troublesome):
    name = summary = "raises"

    def do(self):
        raise LookupError("no such thing")


class AsksForAllMemory(_Troublesome):
    name = summary = "asks_for_all_memory"

    def do(self):
        torch.empty(2**55, dtype=torch.uint8)


class Exits(_Troublesome):
    name = summary = "exits"

    def do(self):
        os._exit(3)


class IsKilled(_Troublesome):
    name = summary = "is_killed"

    def do(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Crashes(_Troublesome):
    name = summary = "crashes"

    def do(self):
        ctypes.string_at(0)


class Hangs(_Troublesome):
    name = summary = "hangs"

    def do(self):
        while True:
            time.sleep(1)


class HangsDeaf(Hangs):
    name = summary = "hangs_deaf"

    def do(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        super().do()


class TakesItsTime(_Troublesome):
    name = summary = "takes_its_time"

    def attach(self, backbone, num_classes):
        backbone.insert_after_stage(0, Deed(lambda step: time.sleep(0.1)))
'''

SLOW = "takes_its_time"


@contextlib.contextmanager
def loaded(plugin: Path) -> Iterator[None]:
    """Register the plugin's methods in this process; a job's process loads them by the job's options."""
    with (
        mock.patch.dict(methods._known),
        mock.patch.dict(plugins._loaded),
        mock.patch.dict(os.environ),
    ):
        plugins.load([plugin])
        os.environ.pop(plugins.VARIABLE)
        yield


@dataclass(frozen=True)
class Cells:
    """Makes jobs of one cell each, of one dataset and budget."""

    dataset: Path
    budget: Path
    plugin: Path

    def job(self, runs: Path, method: str = "spm", seed: int = 0, settings: dict[str, Any] | None = None,
            head: str = "fpn:16", **options: Any) -> Job:  # fmt: skip
        """`options`: fields of `ExecutionOptions`."""
        step_costs.lend(runs)
        request = Request(
            method, "test_resnet", "random", str(self.dataset), head, str(self.budget), seed, settings=settings or {}
        )
        fingerprint = resolve(request, RunStore(runs), self.dataset).spec.fingerprint
        usual = {"device": "cpu", "tracking": "off", "workers": 0, "threads": 1, "plugins": (self.plugin,)}
        chosen = ExecutionOptions(runs=runs, data=self.dataset, **{**usual, **options})
        return Job((JobCell(request, fingerprint),), chosen)


def as_one(*jobs: Job) -> Job:
    """One job of the cells of several, with the options of the first."""
    return replace(jobs[0], cells=tuple(cell for job in jobs for cell in job.cells))


def folder(job: Job) -> RunFolder:
    """That of its first cell."""
    return RunFolder(job.options.runs / job.name)


def state(result: JobResult) -> RunState:
    return result.outcome.state


def executions(job: Job) -> tuple[int, int]:
    """How often the run was started, and how often it was resumed from a checkpoint."""
    log = folder(job).log_path.read_text()
    return log.count("training on"), log.count("resuming from step")


def results_of(job: Job) -> dict[str, Any]:
    """What must not depend on where and in how many attempts a run was executed."""
    result = folder(job).read_result()
    step_costs.keep(job.options.runs)
    found = result.model_dump(include={"metrics", "parameters", "steps", "images", "train_flops"})
    tensors = load_file(folder(job).delta_path)
    stored = load_confusions(folder(job).confusions_path)
    found["confusions"] = stored.names, stored.groups, stored.matrices.tolist()
    return {**found, "delta": {name: (tensor.dtype.str, tensor.tobytes()) for name, tensor in tensors.items()}}


HANGS = 900
"""Seconds after which a wait fails: far more than a busy machine needs."""


def wait_until(reached: Callable[[], object], seconds: float = HANGS, what: object = "") -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"waited for too long {what}"
        time.sleep(0.01)


def steps_done(job: Job) -> int:
    return len(folder(job).curve())


def run_all(launcher: Launcher, jobs: Iterable[Job]) -> dict[str, JobResult]:
    """Every job to its end, as many at once as the launcher takes; by fingerprint."""
    waiting, running, ended = list(jobs), 0, dict[str, JobResult]()
    while waiting or running:
        while waiting and launcher.free > 0:
            job = waiting.pop(0)
            launcher.submit(job)
            running += len(job.cells)
        found = all_ends(launcher, 1)
        running -= len(found)
        ended |= found
    return ended


def all_ends(launcher: Launcher, count: int, seconds: float = HANGS) -> dict[str, JobResult]:
    """Results of at least `count` cells of the submitted jobs, by fingerprint."""
    ended: dict[str, JobResult] = {}
    end = time.monotonic() + seconds
    while len(ended) < count:
        assert time.monotonic() < end, f"waited for too long; ended so far: {list(ended.values())}"
        ended |= {result.cell.fingerprint: result for result in launcher.wait(1)}
    return ended


def only_end(launcher: Launcher) -> JobResult:
    """The result of the next job."""
    (ended,) = all_ends(launcher, 1).values()
    return ended


def start_launcher(code: str, pickled: bytes, **variables: str) -> subprocess.Popen[bytes]:
    """A Python process in which a launcher can be killed. `sys.argv[1]` is what was pickled, in hex."""
    command = [sys.executable, "-c", code, pickled.hex()]
    return subprocess.Popen(command, env=environment(**variables), start_new_session=True)
