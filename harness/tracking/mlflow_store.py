"""The experiment `harness` in one MLflow store: finding, creating and updating its runs. MLflow is imported on use.

Updates are idempotent. What is sent is defined in `records.py`, when in `mirror.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from harness.runs.state import RunState
from harness.tracking.records import ATTEMPT, FINGERPRINT, SEARCH, MetricRow, MLflowRecord
from harness.util.files import atomically, sqlite_url

if TYPE_CHECKING:
    from mlflow.entities import Run

EXPERIMENT = "harness"
OFF = "off"
"""The tracking URI that turns MLflow off."""

STATE, REASON = "harness.state", "harness.reason"
MIRRORED = "harness.mirrored"
"""Tag: the last step of the curve in MLflow, and the digest of everything that was sent."""
PARENT = "mlflow.parentRunId"
"""Tag by which MLflow nests runs."""

_ENVIRONMENT = {
    # A server that does not answer delays a run by one request, once. No retries: a request to create a run that
    # timed out may have been carried out, and a second one would create a second run.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # MLflow logs the creation of the schema.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_LONGEST_TAG = 5000  # characters
_LARGEST_BATCH = 800  # metrics in one request; MLflow takes 1000 of metrics, params and tags together


def load_mlflow() -> None:
    """Import MLflow with its SQL store, which takes seconds, for a process that others are forked from."""
    _set_environment()
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    from sqlalchemy.orm import configure_mappers

    configure_mappers()


def _set_environment() -> None:
    """MLflow reads it when it is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def tracking_uri(runs: Path, uri: str | None) -> str | None:
    """Where MLflow runs are stored: `uri`, else MLFLOW_TRACKING_URI, else SQLite in `runs`; None for "off".

    Raises `UserError` where the path of `runs` cannot be in a URL.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(runs / "mlflow.db")
    return None if uri == OFF else uri


def artifacts_uri(runs: Path) -> str:
    """Where a database store stores files."""
    return (runs.absolute() / "mlartifacts").as_uri()


def is_database(uri: str) -> bool:
    return urlsplit(uri).scheme.split("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


class MLflowStore:
    """A connection to one store. MLflow's exceptions are not caught."""

    def __init__(self, runs: Path, uri: str) -> None:
        self._known: dict[tuple[str, str], list[Run]] = {}
        _set_environment()
        from mlflow import MlflowClient

        if not is_database(uri):
            self._client = MlflowClient(uri)
            self._experiment = self._find_or_create_experiment()
            return
        artifacts = artifacts_uri(runs)
        with _database(runs, uri, artifacts):
            self._client = MlflowClient(uri)
            self._experiment = self._find_or_create_experiment(artifacts)

    def read_ahead(self) -> None:
        """Read all runs in a few requests, for a caller that updates every one: a request each takes seconds."""
        self._known = {}
        for run in self._search(""):
            for key in (FINGERPRINT, SEARCH):
                if (value := run.data.tags.get(key)) is not None:
                    self._known.setdefault((key, value), []).append(run)

    def answers(self) -> bool:
        try:
            return self._client.get_experiment_by_name(EXPERIMENT) is not None
        except Exception:
            return False

    def running_runs(self) -> list[str]:
        """The fingerprints of the runs that MLflow shows as running."""
        return self._running(FINGERPRINT)

    def running_searches(self) -> list[str]:
        """The names of the searches that MLflow shows as running."""
        return self._running(SEARCH)

    def _running(self, tag: str) -> list[str]:
        found = self._search(f"attributes.status = 'RUNNING' AND tags.`{tag}` LIKE '%'")
        return [run.data.tags[tag] for run in found]

    def update(self, record: MLflowRecord) -> bool:
        """Send what MLflow does not have yet; returns False if it had everything."""
        run = self._find(record) or self._client.create_run(
            self._experiment, record.started, record.identity, record.name
        )
        mirrored = run.data.tags.get(MIRRORED, "-1")
        sent = int(mirrored.split()[0])
        complete = f"{max(sent, record.last_step)} {record.digest}"
        if mirrored != complete:
            for path, folder in record.artifacts:
                self._client.log_artifact(run.info.run_id, str(path), folder)
            self._set_status(run, record)
            rows = [row for row in record.curve if row.step > sent] + record.values
            tags = {STATE: record.outcome.state.value, REASON: record.outcome.reason or "", MIRRORED: complete}
            self._log(run.info.run_id, rows, record.params, tags)
        return self._nest(run, record.trials) or mirrored != complete

    def _nest(self, parent: Run, trials: frozenset[str]) -> bool:
        """Nest the runs of trials under their search's run; returns whether one changed. Shared runs are not moved."""
        if not trials:
            return False
        run_id = parent.info.run_id
        searches = {run.info.run_id for run in self._search(f"tags.`{SEARCH}` LIKE '%'")}
        nested = {run.data.tags[FINGERPRINT] for run in self._search(f"tags.`{PARENT}` = '{run_id}'")}
        changed = False
        for fingerprint in trials - nested:
            for run in self._search(f"tags.`{FINGERPRINT}` = '{fingerprint}'"):
                if run.data.tags.get(PARENT) not in searches:
                    self._client.set_tag(run.info.run_id, PARENT, run_id)
                    changed = True
        return changed

    def _log(self, run_id: str, rows: list[MetricRow], params: dict[str, str], tags: dict[str, str]) -> None:
        """Send in one request if possible. The tags are sent last: without them everything is sent again."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(*row) for row in rows]
        while len(metrics) > _LARGEST_BATCH:
            self._client.log_batch(run_id, metrics[:_LARGEST_BATCH])
            metrics = metrics[_LARGEST_BATCH:]
        self._client.log_batch(
            run_id,
            metrics,
            [Param(name, text) for name, text in params.items()],
            [RunTag(name, text[:_LONGEST_TAG]) for name, text in tags.items()],
        )

    def _search(self, condition: str) -> list[Run]:
        """The runs that match a filter, ordered by start time and id: in the same order for every process."""
        found: list[Run] = []
        token: str | None = ""
        while token is not None:
            page = self._client.search_runs([self._experiment], condition, page_token=token or None)
            found += page
            token = page.token or None
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def _set_status(self, run: Run, record: MLflowRecord) -> None:
        status = record.outcome.state.mlflow
        if status == run.info.status:
            return
        if status == "RUNNING":
            self._client.update_run(run.info.run_id, status)
        else:
            self._client.set_terminated(run.info.run_id, status, record.changed)

    def _find(self, record: MLflowRecord) -> Run | None:
        """The MLflow run of the record. Ends MLflow runs that a killed attempt left running."""
        key, value = next(iter(record.identity.items()))
        found = self._known.get((key, value)) or self._search(f"tags.`{key}` = '{value}'")
        for run in found:
            if int(run.data.tags.get(ATTEMPT, 1)) < record.attempt and run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, RunState.INTERRUPTED.mlflow, record.changed)
        # There are two where a run and a `sync` created one at the same time, or where a request that timed out was
        # carried out anyway. Every process chooses the same one.
        same = [run for run in found if record.identity.items() <= run.data.tags.items()]
        for other in same[1:]:
            self._client.delete_run(other.info.run_id)
        return same[0] if same else None

    def _find_or_create_experiment(self, artifacts: str | None = None) -> str:
        from mlflow.exceptions import MlflowException

        if (experiment := self._client.get_experiment_by_name(EXPERIMENT)) is None:
            try:
                return self._client.create_experiment(EXPERIMENT, artifacts)
            except MlflowException:  # another process was faster
                if (experiment := self._client.get_experiment_by_name(EXPERIMENT)) is None:
                    raise
        return experiment.experiment_id


@contextmanager
def _database(runs: Path, uri: str, artifacts: str) -> Iterator[None]:
    """Be the only process that prepares the database: concurrent creations of the schema fail.

    Raises immediately if no database answers: MLflow itself retries ten times, over 100 s.
    """
    import sqlalchemy

    runs.mkdir(parents=True, exist_ok=True)
    database = sqlalchemy.make_url(uri).database if uri.startswith("sqlite") else None
    file = Path(database) if database and Path(database).parent.is_dir() else None
    with FileLock((file.parent if file else runs) / ".mlflow.lock", timeout=60):
        if file and not file.exists():
            _create_sqlite(file, artifacts)
        engine = sqlalchemy.create_engine(uri)
        try:
            sqlalchemy.inspect(engine).get_table_names()
        finally:
            engine.dispose()
        yield


def _create_sqlite(path: Path, artifacts: str) -> None:
    """Create the whole schema in a temporary file and rename it: MLflow cannot use an incomplete one."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for unfinished in path.parent.glob(f".{path.name}.*.tmp*"):  # of a process that was killed
        unfinished.unlink(missing_ok=True)
    with atomically(path) as temporary:
        SqlAlchemyStore(f"sqlite:///{temporary}", artifacts).engine.dispose()
