"""MLflow stores that are missing, broken, slow or away, and the pages of the local one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.tracking.mirror import Mirror, sync
from tests.support.tracked_runs import MadeRun, Mirrored, free_port, mlflow_server, start, strict, wait_for

# The local database


@pytest.mark.exhaustive
def test_four_processes_create_one_store_together(fresh: Path) -> None:
    made = [MadeRun(fresh, seed) for seed in range(4)]
    for run in made:
        run.curve(10)
        run.finish()
    code = (
        "import sys; from pathlib import Path; from harness.tracking.mirror import Mirror\n"
        "runs, folder = map(Path, sys.argv[1:])\n"
        "sys.exit(not Mirror(runs, None, print).update(folder, final=True))"
    )
    processes = [start(code, fresh, run.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for run in made]
    output = [process.communicate(timeout=900)[0] for process in processes]
    assert output == [""] * 4, "neither our warnings nor MLflow's messages about its schema"
    assert [process.returncode for process in processes] == [0] * 4
    assert len(Mirrored(fresh).runs()) == 4


def test_half_created_database_is_created_again(fresh: Path) -> None:
    code = (
        "import os, signal, sys, threading; from pathlib import Path\n"
        "import mlflow.store.db.utils as utils; from harness.tracking.mlflow_store import MLflowStore\n"
        "utils._upgrade_db = lambda engine: os.kill(os.getpid(), signal.SIGKILL)  # the tables are half made\n"
        "MLflowStore(Path(sys.argv[1]), sys.argv[2])"
    )
    process = start(code, fresh, f"sqlite:///{fresh}/mlflow.db", stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == -signal.SIGKILL, errors
    made = MadeRun(fresh)
    assert Mirror(fresh, None, strict).update(made.path)
    assert Mirrored(fresh).only().info.status == "RUNNING"
    assert not list(fresh.glob(".mlflow.db.*"))


def test_broken_database_fails_at_once(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_text("not a database " * 100)
    warnings: list[str] = []
    begin = time.monotonic()
    assert not Mirror(runs, f"sqlite:///{tmp_path}/broken.db", warnings.append).update(MadeRun(runs).path)
    assert time.monotonic() - begin < 5
    assert len(warnings) == 1 and "file is not a database" in warnings[0]


# Servers


def test_server_outage_costs_warnings_and_no_metrics(fresh: Path, tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    early, late = MadeRun(fresh, 0), MadeRun(fresh, 1)

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

    with mlflow_server(tmp_path / "server", port) as server:
        mirror = Mirror(fresh, uri, warnings.append)
        late.curve(10)
        assert mirror.update(late.path)
        summary = sync(fresh, uri)
        assert (summary.mirrored, summary.failed) == (2, {})
        shown = {run.info.run_name[-5:]: run.info.status for run in Mirrored(fresh, uri).runs()}
        assert shown == {"seed0": "FINISHED", "seed1": "KILLED"}, "no process executes the second"

        os.killpg(server.pid, signal.SIGSTOP)
        for step in (20, 30):
            late.curve(step)
            assert not mirror.update(late.path)
        assert len(warnings) == 2 and "timed out" in warnings[1]
        late.finish()

        os.killpg(server.pid, signal.SIGCONT)  # which then carries out what it was asked meanwhile
        assert mirror.update(late.path, final=True)
        assert len(warnings) == 2
        mirrored = Mirrored(fresh, uri)
        run = next(run for run in mirrored.runs() if run.info.run_name.endswith("seed1"))
        history = mirrored.client.get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in history] == [10, 20, 30]
        assert {file.path for file in mirrored.client.list_artifacts(run.info.run_id)} > {"result.json"}
        assert sync(fresh, uri).current == 2
    assert not (fresh / "mlflow.db").exists()


def test_server_that_never_answers_costs_seconds_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")  # a user's own, which stays
    made = MadeRun(fresh)
    made.curve(10)
    warnings: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}"
        mirror = Mirror(fresh, uri, warnings.append)
        begin = time.monotonic()
        assert not mirror.update(made.path)
        first = time.monotonic() - begin
        for _ in range(20):
            assert not mirror.update(made.path)
        later = time.monotonic() - begin - first
    assert first < 5
    assert later < 0.1
    assert len(warnings) == 1
    assert "timed out" in warnings[0] and "secret" not in warnings[0]


def test_request_may_take_eight_seconds_once_by_default(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    Mirror(runs, None, strict).update(MadeRun(runs).path)
    assert [os.environ[name] for name in names] == ["8", "0"]


# Pages


@pytest.mark.exhaustive
def test_ui_serves_the_local_store_until_ctrl_c(runs: Path) -> None:
    made = MadeRun(runs)
    made.finish()
    Mirror(runs, None, strict).update(made.path, final=True)
    run_id, port = Mirrored(runs).only().info.run_id, free_port()
    code = (
        "import sys; from pathlib import Path; from harness.tracking.mirror import ui\n"
        "sys.exit(ui(Path(sys.argv[1]), port=int(sys.argv[2])))"
    )
    with (runs / "ui.log").open("w") as log:
        process = start(code, runs, port, stdout=log, stderr=log, start_new_session=True)
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
    assert shown == [made.run.result_path.read_bytes()]
    assert "Traceback" not in (runs / "ui.log").read_text()
