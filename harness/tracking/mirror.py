"""The mirror of run folders in MLflow, so that runs can be watched, sorted and compared in a browser.

It is derived from the folders alone: `sync` refills a store that was lost or could not be reached.
What MLflow shows of a folder is defined in `records.py`; the client is `mlflow_store.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from harness.errors import UserError
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.tracking.mlflow_store import MLflowStore, artifacts_uri, is_database, tracking_uri
from harness.tracking.records import MalformedFolder, MLflowRecord, read_run, read_search
from harness.util.text import innermost_reason, safe_url


class Mirror:
    """Updates MLflow from run folders while runs are executed. It never stops or fails a run.

    `uri` is a tracking URI, "off", or None: that of the environment, else a SQLite store in `runs`.
    `warn` is called with one line if tracking fails.
    """

    def __init__(self, runs: Path, uri: str | None, warn: Callable[[str], None]) -> None:
        self._runs = RunStore(runs)
        self._uri = tracking_uri(runs, uri)
        self._warn = warn
        self._store: MLflowStore | None = None
        self._down = False

    def update(self, folder: Path, final: bool = False) -> bool:
        """Update the MLflow run of this run folder; True where it is now up to date.

        `final`: the attempt has ended; otherwise the caller executes it. A failure is one warning, never an exception;
        afterwards only `final` updates are tried.
        """

        def read() -> MLflowRecord:
            run = self._runs.by_fingerprint(folder.name)
            return read_run(run, self._runs.outcome(run) if final else Outcome(RunState.RUNNING))

        return self._update(read, final)

    def update_search(self, folder: Path, final: bool = False, stopped: Collection[str] = ()) -> bool:
        """As `update`, for a folder under `searches`: its own MLflow run, with its trials' runs nested under it.

        `final`: the caller executes it no longer, and stops the runs with the fingerprints `stopped`.
        """

        def is_executed(fingerprint: str) -> bool:
            return not final or (fingerprint not in stopped and _is_executed(self._runs, fingerprint))

        return self._update(lambda: read_search(folder, is_executed), final)

    def _update(self, read: Callable[[], MLflowRecord], final: bool) -> bool:
        if self._uri is None or (self._down and not final):
            return False
        try:
            record = read()
            if self._store is None:
                self._store = MLflowStore(self._runs.root, self._uri)
                _end_abandoned(self._runs, self._store)
            self._store.update(record)
        except Exception as error:  # MLflow and the libraries under it raise anything
            if not self._down:
                self._warn(
                    f"tracking in {safe_url(self._uri)} failed ({innermost_reason(error, self._uri)}); "
                    "runs continue without it, and `harness sync` updates MLflow later"
                )
            self._down = True
            return False
        self._down = False
        return True


def tracked_store(runs: Path, tracking: str | None, warn: Callable[[str], None]) -> RunStore:
    """A run store that mirrors in MLflow every state that is written to one of its folders.

    MLflow is imported when that first happens. `tracking` and `warn`: see `Mirror`.
    """
    return RunStore(runs, Mirror(runs, tracking, warn).update)


def _is_executed(runs: RunStore, fingerprint: str) -> bool:
    return runs.lock_owner(runs.by_fingerprint(fingerprint)) is not None


def _end_abandoned(runs: RunStore, store: MLflowStore) -> None:
    """End the MLflow runs whose processes were killed and could not do so themselves: of runs, then of searches."""
    for fingerprint in store.running_runs():
        run = runs.by_fingerprint(fingerprint)
        outcome = runs.outcome(run)
        if outcome.state is RunState.INTERRUPTED:
            store.update(read_run(run, outcome))
    for name in store.running_searches():
        with contextlib.suppress(MalformedFolder):  # the folder is gone or damaged; `sync` names it
            record = read_search(runs.root / "searches" / name, partial(_is_executed, runs))
            if record.outcome.state is RunState.INTERRUPTED:
                store.update(record)


@dataclass
class Summary:
    """The number of folders by what `sync` did."""

    mirrored: int = 0
    current: int = 0
    """Already up to date."""
    failed: dict[str, str] = field(default_factory=dict)
    """Name of the folder -> reason."""


def sync(runs: Path, uri: str | None = None) -> Summary:
    """Update MLflow from every run folder in `runs`, then from every search.

    A folder that cannot be read is listed in the summary and does not stop the others.

    Raises `UserError` if `runs` does not exist or the tracking store cannot be reached.
    """
    location = tracking_uri(runs, uri)
    if location is None:
        raise UserError("--tracking off: no store to sync with; omit the flag or name a store")
    if not runs.is_dir():
        raise UserError(f"--runs {runs}: no such folder")
    summary = Summary()
    store: MLflowStore | None = None
    lost = ""
    for name, read in _readers(runs):
        try:
            record = read()
        except MalformedFolder as error:
            summary.failed[name] = str(error)
            continue
        if lost:
            summary.failed[name] = lost
            continue
        if store is None:
            store = _connect(runs, location)
            with contextlib.suppress(Exception):  # then each run is requested by itself
                store.read_ahead()
        try:
            if store.update(record):
                summary.mirrored += 1
            else:
                summary.current += 1
        except Exception as error:
            summary.failed[name] = innermost_reason(error, location)
            # One rejected run must not stop the others; a dead server must, at 8 s for each.
            if not store.answers():
                lost = f"not tried: tracking no longer answers ({innermost_reason(error, location)})"
    return summary


def _readers(runs: Path) -> list[tuple[str, Callable[[], MLflowRecord]]]:
    """The name of each folder and how to read it; trials' runs come before their searches."""
    store = RunStore(runs)
    searches = sorted(path.parent for path in runs.glob("searches/*/search.json"))
    return [
        *((run.fingerprint, lambda run=run: read_run(run, store.outcome(run))) for run in store),
        *(
            (folder.name, lambda folder=folder: read_search(folder, partial(_is_executed, store)))
            for folder in searches
        ),
    ]


def ui(runs: Path, uri: str | None = None, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Serve the local store's pages until Ctrl-C and return the exit code; takes over the process's signals.

    Raises `UserError` if there is no local store or the port is taken.
    """
    location = tracking_uri(runs, uri)
    if location is None:
        raise UserError("--tracking off: no store to show; omit the flag or name a store")
    if not is_database(location):
        raise UserError(f"--tracking {safe_url(location)}: not a local store; open it in a browser")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; choose another port") from error
    _connect(runs, location)  # creates the schema, quietly
    command = [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port), "--workers", "1"]
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": location,  # other users of the machine can read a command line, with its password
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts_uri(runs),  # else ./mlruns, for an experiment made in the browser
    }
    # Its job runner is for evaluations of language models: ten processes, each with a traceback on Ctrl-C.
    environment.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    # A group of its own: Ctrl-C reaches every process of the terminal's group, and MLflow also passes it on to its
    # web server, which on the second signal stops at once, with a traceback.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, process_group=0)
    ending = False

    def end(number: int, frame: object) -> None:
        nonlocal ending
        ending = True
        server.terminate()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    code = server.wait()
    return 0 if ending else code


def _connect(runs: Path, uri: str) -> MLflowStore:
    """Raises `UserError` if the store cannot be used."""
    try:
        return MLflowStore(runs, uri)
    except Exception as error:
        raise UserError(
            f"--tracking {safe_url(uri)}: cannot be reached ({innermost_reason(error, uri)}); "
            "start or repair it, or name another store"
        ) from error
