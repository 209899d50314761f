"""Run folders in every state, what MLflow shows of them, and a tracking server that can be killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.spec import Spec, budgets
from harness.tracking.mlflow_store import EXPERIMENT, tracking_uri
from tests.support import results

CLASSES = [
    {"name": "road/track", "iou": 0.9, "acc": 0.95, "dice": 0.94},
    {"name": "..", "iou": 0.25, "acc": 0.5, "dice": 0.4},
    {"name": "bicyclist", "iou": None, "acc": None, "dice": None},
]


class MadeRun:
    """A run folder that looks as if its run were being executed, until it is ended."""

    def __init__(self, runs: Path, seed: int = 0) -> None:
        self.spec = Spec(
            method="spm",
            hyperparameters={"hidden": 32, "guidance": True, "note": "x" * 7000},
            backbone="tf_efficientnet_lite0",
            weights="imagenet",
            dataset="landcover",
            data_digest="0" * 16,
            head="fcn",
            budget=budgets()["demo"],
            seed=seed,
        )
        self.run = RunStore(runs).folder(self.spec)
        self.path = self.run.path
        self.begin()
        self.run.log_path.write_text("step 10 loss 0.1\n")

    def begin(self, attempt: int = 1) -> None:
        self.run.begin(self.spec, attempt)

    def curve(self, *steps: int, **values: float) -> None:
        for step in steps:
            point = {"loss": 1 / step, "lr": 0.1, "miou_train": step / 100, "images_per_second": 40.0}
            self.run.append_curve({"step": step} | point | values)

    def end(self, state: str, reason: str) -> None:
        self.run.finish(Outcome(RunState(state), reason))

    def finish(self) -> None:
        self.run.delta_path.write_bytes(bytes(1000))
        self.run.samples_path.mkdir()
        (self.run.samples_path / "0.png").write_bytes(b"png")
        result = results.make_result(
            self.spec, metrics={"miou": 0.575, "per_class": CLASSES}, parameters={"trainable": 200}
        )
        results.finish(self.run, result)


class Mirrored:
    """What MLflow shows, asked with its own client."""

    def __init__(self, runs: Path, uri: str | None = None) -> None:
        location = tracking_uri(runs, uri)
        assert location is not None
        self.client = MlflowClient(location)

    def runs(self) -> list[Run]:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        return list(self.client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]))

    def only(self) -> Run:
        (run,) = self.runs()
        return run

    def state(self) -> tuple[str, str, str]:
        """Of the only run: MLflow's status, our state, our reason."""
        run = self.only()
        return run.info.status, run.data.tags["harness.state"], run.data.tags["harness.reason"]

    def steps(self, metric: str = "train/loss") -> list[int]:
        return [point.step for point in self.client.get_metric_history(self.only().info.run_id, metric)]

    def artifacts(self, folder: str | None = None) -> set[str]:
        return {file.path for file in self.client.list_artifacts(self.only().info.run_id, folder)}


def strict(message: str) -> None:
    """Takes a warning where there must be none."""
    pytest.fail(message)


def start(code: str, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """A Python process that executes `code`."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, **options)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(happened: Callable[[], bool], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A tracking server, the leader of a process group, which is killed when the block ends."""
    folder.mkdir(exist_ok=True)
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    try:

        def healthy() -> bool:
            assert server.poll() is None, (folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=1):
                    return True
            except OSError:
                return False

        wait_for(healthy)
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def write_trials(folder: Path, trials: list[dict[str, Any]], **definition: Any) -> None:
    """The folder of a search."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.json").write_text(json.dumps({"objectives": ["miou"], **definition}))
    (folder / "trials.json").write_text(json.dumps(trials))
