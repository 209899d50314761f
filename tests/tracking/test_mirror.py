"""The MLflow mirror: real stores, a real server that comes and goes, and folders as a run leaves them."""

from __future__ import annotations

import json
import math
import os
import shutil
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

from harness.errors import UserError
from harness.spec import Spec, budgets
from harness.tracking.mirror import EXPERIMENT, Mirror, sync, tracking_uri

STEPS = 50
CLASSES = [
    {"name": "road/track", "iou": 0.9, "acc": 0.95, "dice": 0.94},
    {"name": "..", "iou": 0.25, "acc": 0.5, "dice": 0.4},
    {"name": "bicyclist", "iou": None, "acc": None, "dice": None},
]


@pytest.fixture(autouse=True)
def _no_tracking_server_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A folder for runs without a store."""
    runs = tmp_path / "my #runs"  # users' folders have such names, and they end up in URIs
    runs.mkdir()
    return runs


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with tables and nothing in them: to create it takes two seconds, to copy it none."""
    path = tmp_path_factory.mktemp("schema") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").get_experiment_by_name(EXPERIMENT)
    return path


@pytest.fixture
def runs(fresh: Path, schema: Path) -> Path:
    shutil.copy(schema, fresh / "mlflow.db")
    return fresh


class RunFolder:
    """A run folder, written as a run writes it."""

    def __init__(self, runs: Path, seed: int = 0) -> None:
        spec = Spec(
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
        self.path = runs / spec.fingerprint
        self.path.mkdir(parents=True)
        (self.path / "spec.yaml").write_text(spec.to_yaml())
        (self.path / "log.txt").write_text("step 10 loss 0.1\n")
        self.status("running")

    def status(self, state: str, reason: str | None = None, attempt: int = 1) -> None:
        status = {"state": state, "reason": reason, "step": 0, "steps": STEPS, "attempt": attempt}
        (self.path / "status.json").write_text(json.dumps(status))

    def curve(self, *steps: int, **figures: float) -> None:
        with (self.path / "curve.jsonl").open("a") as file:
            for step in steps:
                point = {"loss": 1 / step, "lr": 0.1, "miou_train": step / 100, "images_per_second": 40.0}
                file.write(json.dumps({"step": step} | point | figures) + "\n")

    def finish(self) -> None:
        (self.path / "delta.safetensors").write_bytes(bytes(1000))
        (self.path / "samples").mkdir()
        (self.path / "samples" / "0.png").write_bytes(b"png")
        result: dict[str, Any] = {
            "metrics": {"miou": 0.575, "macc": 0.7, "per_class": CLASSES},
            "parameters": {"method": 140, "head": 60, "trainable": 200, "backbone": 3000},
            "steps": STEPS,
            "images_per_second": 41.5,
            "provenance": {"git": {"dirty": False}, "processes": 1},
        }
        (self.path / "result.json").write_text(json.dumps(result))
        self.status("done")


class Mirrored:
    """What MLflow now says, asked with its own client."""

    def __init__(self, runs: Path, uri: str | None = None) -> None:
        location = tracking_uri(runs, uri)
        assert location is not None
        self.client = MlflowClient(location)

    def runs(self) -> list[Any]:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        return list(self.client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]))

    def only(self) -> Any:
        (run,) = self.runs()
        return run

    def steps(self, metric: str = "train/loss") -> list[int]:
        return [point.step for point in self.client.get_metric_history(self.only().info.run_id, metric)]

    def artifacts(self, folder: str | None = None) -> set[str]:
        return {file.path for file in self.client.list_artifacts(self.only().info.run_id, folder)}


def strict(message: str) -> None:
    pytest.fail(message)


# A folder and its MLflow run


def test_a_running_folder_is_a_running_mlflow_run_with_the_spec_as_parameters(runs: Path) -> None:
    folder = RunFolder(runs)
    folder.curve(10, 20)
    assert Mirror(runs, None, strict).update(folder.path)
    run = Mirrored(runs).only()
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "spm/tf_efficientnet_lite0/landcover/seed0"
    assert run.data.params["method"] == "spm"
    assert run.data.params["hyperparameters.guidance"] == "true"
    assert run.data.params["budget.crop"] == "[96, 96]"
    assert len(run.data.params["hyperparameters.note"]) == 6000
    assert run.data.metrics["train/loss"] == 1 / 20


def test_a_done_folder_brings_its_figures_and_files(runs: Path) -> None:
    folder = RunFolder(runs)
    folder.curve(10, 20)
    folder.finish()
    Mirror(runs, None, strict).update(folder.path, final=True)
    mirrored = Mirrored(runs)
    run = mirrored.only()
    assert run.info.status == "FINISHED"
    assert run.data.metrics["miou"] == 0.575
    assert run.data.metrics["parameters.trainable"] == 200
    assert run.data.metrics["images_per_second"] == 41.5
    assert {name: value for name, value in run.data.metrics.items() if name.startswith("iou/")} == {
        "iou/road_track": 0.9,
        "iou/__": 0.25,
    }
    assert not any("provenance" in name for name in run.data.metrics)
    files = {"result.json", "spec.yaml", "log.txt", "delta.safetensors", "samples"}
    assert mirrored.artifacts() == files
    assert mirrored.artifacts("samples") == {"samples/0.png"}
    assert (runs / "mlartifacts").is_dir()


@pytest.mark.parametrize(
    ("state", "status"),
    [("failed", "FAILED"), ("diverged", "FAILED"), ("out_of_memory", "FAILED"), ("interrupted", "KILLED")],
)
def test_a_run_that_ended_badly_says_how_and_why(runs: Path, state: str, status: str) -> None:
    folder = RunFolder(runs)
    folder.status(state, "the reason")
    Mirror(runs, None, strict).update(folder.path, final=True)
    run = Mirrored(runs).only()
    assert run.info.status == status
    assert (run.data.tags["harness.state"], run.data.tags["harness.reason"]) == (state, "the reason")


def test_loss_that_is_no_number_leaves_a_gap_not_a_zero(runs: Path) -> None:
    folder = RunFolder(runs)
    folder.curve(10)
    folder.curve(20, loss=math.nan)
    folder.curve(30, loss=math.inf)
    with (folder.path / "curve.jsonl").open("a") as file:
        file.write('{"step": 40, "loss": NaN}\n')
    folder.status("diverged", "loss is nan at step 20")
    Mirror(runs, None, strict).update(folder.path, final=True)
    assert Mirrored(runs).steps("train/loss") == [10]
    assert Mirrored(runs).steps("train/lr") == [10, 20, 30]


def test_a_half_written_line_waits_for_its_other_half(runs: Path) -> None:
    folder = RunFolder(runs)
    folder.curve(10)
    whole = (folder.path / "curve.jsonl").read_text()
    with (folder.path / "curve.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 0.0')
    mirror = Mirror(runs, None, strict)
    assert mirror.update(folder.path)
    assert Mirrored(runs).steps() == [10]
    (folder.path / "curve.jsonl").write_text(whole)
    folder.curve(20)
    assert mirror.update(folder.path)
    assert Mirrored(runs).steps() == [10, 20]


# Again


def test_mirroring_twice_changes_nothing(runs: Path) -> None:
    folder = RunFolder(runs)
    folder.curve(10, 20)
    folder.finish()
    for _ in range(2):
        assert Mirror(runs, None, strict).update(folder.path, final=True)
    assert Mirrored(runs).steps() == [10, 20]
    assert Mirrored(runs).steps("miou") == [20]
    assert sync(runs).current == 1


def test_what_was_sent_but_not_marked_as_complete_is_sent_again_without_a_trace(runs: Path) -> None:
    folder = RunFolder(runs)
    folder.curve(10, 20)
    folder.finish()
    Mirror(runs, None, strict).update(folder.path, final=True)
    mirrored = Mirrored(runs)
    mirrored.client.set_tag(mirrored.only().info.run_id, "harness.logged_step", "-1")
    mirrored.client.delete_tag(mirrored.only().info.run_id, "harness.mirrored")
    assert sync(runs).mirrored == 1
    assert (mirrored.steps(), mirrored.steps("miou")) == ([10, 20], [20])


def test_a_resumed_run_goes_on_where_its_curve_was(runs: Path) -> None:
    folder = RunFolder(runs)
    folder.curve(10, 20, 30)
    Mirror(runs, None, strict).update(folder.path)
    folder.status("interrupted", "Ctrl-C")
    Mirror(runs, None, strict).update(folder.path, final=True)
    (folder.path / "curve.jsonl").unlink()
    folder.curve(10, 20)
    folder.status("running")
    resumed = Mirror(runs, None, strict)
    resumed.update(folder.path)
    assert Mirrored(runs).only().info.status == "RUNNING"
    folder.curve(30, 40)
    resumed.update(folder.path)
    assert Mirrored(runs).steps() == [10, 20, 30, 40]


def test_a_new_attempt_is_a_new_mlflow_run_and_ends_the_dead_one(runs: Path) -> None:
    folder = RunFolder(runs)
    mirror = Mirror(runs, None, strict)
    mirror.update(folder.path)
    folder.status("running", attempt=2)
    mirror.update(folder.path)
    found = {run.data.tags["harness.attempt"]: run.info.status for run in Mirrored(runs).runs()}
    assert found == {"1": "KILLED", "2": "RUNNING"}


def test_two_mlflow_runs_of_one_attempt_become_one(runs: Path) -> None:
    folder = RunFolder(runs)
    folder.curve(10)
    Mirror(runs, None, strict).update(folder.path)
    mirrored = Mirrored(runs)
    first = mirrored.only()
    tags = {key: first.data.tags[key] for key in ("harness.fingerprint", "harness.attempt")}
    mirrored.client.create_run(first.info.experiment_id, first.info.start_time + 1, tags)
    folder.finish()
    sync(runs)
    assert mirrored.only().info.run_id == first.info.run_id


# Many folders


def test_sync_names_what_it_cannot_read_and_goes_on(runs: Path) -> None:
    for seed in range(3):
        RunFolder(runs, seed).finish()
    broken = RunFolder(runs, 3).path
    (broken / "spec.yaml").write_text("method: spm\n")
    empty = runs / ("0" * 16)
    empty.mkdir()
    (runs / "studies").mkdir()
    summary = sync(runs)
    assert (summary.mirrored, summary.current) == (3, 0)
    assert set(summary.failed) == {broken.name, empty.name}
    assert summary.failed[broken.name] == "spec.yaml: hyperparameters: Field required"
    assert summary.failed[empty.name] == "spec.yaml: No such file or directory"
    assert sync(runs).current == 3


@pytest.mark.exhaustive
def test_four_processes_at_once_share_a_store_that_none_of_them_found(fresh: Path) -> None:
    folders = [RunFolder(fresh, seed) for seed in range(4)]
    for folder in folders:
        folder.curve(10)
        folder.finish()
    code = (
        "import sys; from pathlib import Path; from harness.tracking.mirror import Mirror\n"
        "runs, folder = map(Path, sys.argv[1:])\n"
        "sys.exit(not Mirror(runs, None, print).update(folder, final=True))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, fresh, folder.path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder in folders
    ]
    said = [process.communicate(timeout=900)[0] for process in processes]
    assert said == [""] * 4, "neither warnings of ours nor news of MLflow's about its schema"
    assert [process.returncode for process in processes] == [0] * 4
    assert len(Mirrored(fresh).runs()) == 4


# Outages


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(happened: Callable[[], bool], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """A tracking server that dies when the block ends, as servers do: without a word."""
    folder.mkdir(exist_ok=True)
    uri = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
    ]
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
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_server_that_comes_late_and_leaves_early_costs_warnings_and_no_figures(fresh: Path, tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    early, late = RunFolder(fresh, 0), RunFolder(fresh, 1)

    warnings: list[str] = []
    mirror = Mirror(fresh, uri, warnings.append)
    for step in (10, 20):
        early.curve(step)
        assert not mirror.update(early.path)
    early.finish()
    assert not mirror.update(early.path, final=True)
    (warning,) = warnings
    assert "\n" not in warning and len(warning) < 250
    assert uri in warning and "Connection refused" in warning and "harness sync" in warning
    with pytest.raises(UserError, match="cannot be reached"):
        sync(fresh, uri)

    with mlflow_server(tmp_path / "server", port):
        mirror = Mirror(fresh, uri, warnings.append)
        late.curve(10)
        assert mirror.update(late.path)
        summary = sync(fresh, uri)
        assert (summary.mirrored, summary.current, summary.failed) == (1, 1, {})
        seen = {run.info.run_name[-5:]: run.info.status for run in Mirrored(fresh, uri).runs()}
        assert seen == {"seed0": "FINISHED", "seed1": "RUNNING"}

    for step in (20, 30):
        late.curve(step)
        assert not mirror.update(late.path)
    assert len(warnings) == 2
    late.finish()

    with mlflow_server(tmp_path / "server", port):
        assert mirror.update(late.path, final=True)
        assert len(warnings) == 2
        mirrored = Mirrored(fresh, uri)
        run = next(run for run in mirrored.runs() if run.info.run_name.endswith("seed1"))
        history = mirrored.client.get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in history] == [10, 20, 30]
        assert {file.path for file in mirrored.client.list_artifacts(run.info.run_id)} > {"result.json"}
        assert sync(fresh, uri).current == 2
    assert not (fresh / "mlflow.db").exists()


def test_a_server_that_accepts_and_never_answers_costs_seconds_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")  # a user's own, to be kept
    folder = RunFolder(fresh)
    folder.curve(10)
    warnings: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = Mirror(fresh, f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}", warnings.append)
        start = time.monotonic()
        assert not mirror.update(folder.path)
        first = time.monotonic() - start
        for _ in range(20):
            assert not mirror.update(folder.path)
        later = time.monotonic() - start - first
    assert first < 5
    assert later < 0.1
    assert len(warnings) == 1
    assert "timed out" in warnings[0] and "secret" not in warnings[0]


def test_a_request_may_take_eight_seconds_once_where_the_user_has_not_said_otherwise(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    Mirror(runs, None, strict).update(RunFolder(runs).path)
    assert [os.environ[name] for name in names] == ["8", "0"]


def test_a_database_that_cannot_be_opened_fails_at_once(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_text("not a database " * 100)
    warnings: list[str] = []
    start = time.monotonic()
    assert not Mirror(runs, f"sqlite:///{tmp_path}/broken.db", warnings.append).update(RunFolder(runs).path)
    assert time.monotonic() - start < 5
    assert len(warnings) == 1 and "file is not a database" in warnings[0]


def test_a_folder_that_cannot_be_read_is_a_warning_to_the_run(runs: Path) -> None:
    folder = RunFolder(runs)
    (folder.path / "status.json").write_text("{")
    warnings: list[str] = []
    assert not Mirror(runs, None, warnings.append).update(folder.path)
    assert len(warnings) == 1 and "status.json" in warnings[0]


# Where


def test_off_writes_nothing(fresh: Path) -> None:
    folder = RunFolder(fresh)
    assert not Mirror(fresh, "off", strict).update(folder.path, final=True)
    assert list(fresh.iterdir()) == [folder.path]
    with pytest.raises(UserError, match="--tracking off"):
        sync(fresh, "off")


def test_the_argument_goes_before_the_environment_and_both_before_the_local_store(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(runs, None) == f"sqlite:///{runs}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(runs, None) == "http://environment"
    assert tracking_uri(runs, "http://argument") == "http://argument"


@pytest.mark.exhaustive
def test_the_pages_of_the_local_store_open_and_ctrl_c_closes_them_without_a_traceback(runs: Path) -> None:
    folder = RunFolder(runs)
    folder.finish()
    Mirror(runs, None, strict).update(folder.path, final=True)
    run_id, port = Mirrored(runs).only().info.run_id, free_port()
    code = (
        "import sys; from pathlib import Path; from harness.tracking.mirror import ui\n"
        "sys.exit(ui(Path(sys.argv[1]), port=int(sys.argv[2])))"
    )
    with (runs / "ui.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, runs, str(port)], stdout=log, stderr=log, start_new_session=True
        )
    page = f"http://127.0.0.1:{port}/get-artifact?path=result.json&run_uuid={run_id}"
    shown: list[bytes] = []

    def opened() -> bool:
        assert process.poll() is None, (runs / "ui.log").read_text()
        try:
            with urllib.request.urlopen(page, timeout=5) as answer:
                shown.append(answer.read())
        except OSError:
            return False
        return True

    wait_for(opened)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    assert process.wait(timeout=900) == 0
    assert shown == [(folder.path / "result.json").read_bytes()]
    assert "Traceback" not in (runs / "ui.log").read_text()
