"""The mirror of run folders in MLflow, so that runs can be watched, sorted and compared in a browser.

Derived from the folders alone and idempotent: a store that is lost, or was unreachable, is filled by `sync`.
What a run folder holds is for others to decide; here it is only read.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from filelock import FileLock
from pydantic import BaseModel, ValidationError

from harness.errors import UserError, invalid
from harness.runs.state import RunState
from harness.spec import Spec
from harness.util.files import digest

if TYPE_CHECKING:
    from mlflow.entities import Run

EXPERIMENT = "harness"
OFF = "off"
"""The tracking URI that stands for no mirror at all."""

FINGERPRINT, ATTEMPT = "harness.fingerprint", "harness.attempt"
STATE, REASON = "harness.state", "harness.reason"
LOGGED_STEP = "harness.logged_step"
"""Tag: the last step of the curve that MLflow has. Set in the same request as the points up to it."""
MIRRORED = "harness.mirrored"
"""Tag: digest of what the folder held when everything of it had arrived. Set last."""
SEARCH = "harness.search"
"""Tag of the run that stands for a whole search: its name. The runs of its trials are nested under it."""
PARENT = "mlflow.parentRunId"
"""Tag by which MLflow nests runs."""

_ENVIRONMENT = {
    # A server that does not answer holds up a run for one request, once. No retries: a request to create
    # a run that timed out may have been carried out, and a second one would create a second run.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # The creation of the schema is no news to the user.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_LONGEST_PARAM, _LONGEST_TAG, _LONGEST_KEY = 6000, 5000, 250  # characters
_LARGEST_BATCH = 800  # metrics in one request; MLflow takes 1000 of metrics, params and tags together


class Mirror:
    """Keeps the MLflow runs of run folders up to date while the runs go on, and never stands in their way.

    `uri` is a tracking URI, "off", or None: that of the environment, else a SQLite store in `runs`.
    `warn` takes the one line that says that tracking failed.
    """

    def __init__(self, runs: Path, uri: str | None, warn: Callable[[str], None]) -> None:
        self._runs = runs
        self._uri = tracking_uri(runs, uri)
        self._warn = warn
        self._store: _Store | None = None
        self._down = False

    def update(self, folder: Path, final: bool = False) -> bool:
        """Bring the MLflow run of this run folder up to date; True where it now is.

        A failure is warned of once and never raised; after it only a `final` update tries again.
        """
        return self._update(_read, folder, final)

    def update_search(self, folder: Path, final: bool = False) -> bool:
        """As `update`, for a folder under `searches`: its own run, and its trials' runs nested under that."""
        return self._update(_read_search, folder, final)

    def _update(self, read: Callable[[Path], _Record | _SearchRecord], folder: Path, final: bool) -> bool:
        if self._uri is None or (self._down and not final):
            return False
        try:
            record = read(folder)
            self._store = self._store or _Store(self._runs, self._uri)
            self._store.bring_up_to_date(record)
        except Exception as error:  # MLflow and what is below it raise anything
            if not self._down:
                self._warn(
                    f"tracking in {_without_password(self._uri)} failed ({_reason(error, self._uri)}); "
                    "the run goes on, `harness sync` brings MLflow up to date later"
                )
            self._down = True
            return False
        self._down = False
        return True


@dataclass
class Summary:
    """What `sync` did, in run folders."""

    mirrored: int = 0
    current: int = 0
    """Nothing to do: MLflow had all of it."""
    failed: dict[str, str] = field(default_factory=dict)
    """Name of the folder -> why."""


def sync(runs: Path, uri: str | None = None) -> Summary:
    """Bring every run folder in `runs`, and then every search, up to date in MLflow.

    One that cannot be read is named, never fatal.

    Raises `UserError` where there is no such folder or the tracking store cannot be reached at all.
    """
    location = tracking_uri(runs, uri)
    if location is None:
        raise UserError("--tracking off: no store to sync with; leave the flag out or name a store")
    if not runs.is_dir():
        raise UserError(f"--runs {runs}: no such folder")
    summary = Summary()
    store: _Store | None = None
    lost = ""
    folders = sorted(path for path in runs.iterdir() if re.fullmatch(r"[0-9a-f]{16}", path.name))
    searches = sorted(path.parent for path in runs.glob("searches/*/search.json"))
    for folder in [*folders, *searches]:
        try:
            record = (_read_search if folder in searches else _read)(folder)
        except _Malformed as error:
            summary.failed[folder.name] = str(error)
            continue
        if lost:
            summary.failed[folder.name] = lost
            continue
        store = store or _reach(runs, location)
        try:
            if store.bring_up_to_date(record):
                summary.mirrored += 1
            else:
                summary.current += 1
        except Exception as error:
            summary.failed[folder.name] = _reason(error, location)
            # One rejected run is no reason to leave out the others; a dead server is, at 8 s for each.
            if not store.answers():
                lost = f"not tried, tracking no longer answers ({_reason(error, location)})"
    return summary


def ui(runs: Path, uri: str | None = None, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Serve the local store's pages until Ctrl-C and return the exit code; takes over the process's signals.

    Raises `UserError` where there is no local store, or the port is taken.
    """
    location = tracking_uri(runs, uri)
    if location is None:
        raise UserError("--tracking off: no store to show; leave the flag out or name a store")
    if not _is_database(location):
        raise UserError(f"--tracking {_without_password(location)}: not a local store; open it in a browser")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; name another port") from error
    _reach(runs, location)  # creates the schema, quietly
    options = {
        "--backend-store-uri": location,
        "--default-artifact-root": _artifacts(runs),  # else ./mlruns, for an experiment made in the browser
        "--host": host,
        "--port": str(port),
        "--workers": "1",
    }
    command = [sys.executable, "-m", "mlflow", "ui", *(word for pair in options.items() for word in pair)]
    # Its job runner is for evaluations of language models: ten processes, each with a traceback on Ctrl-C.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ
    # A group of its own: Ctrl-C reaches every process of the terminal's group, and MLflow passes it on to its
    # web server besides, which takes the second one for impatience and stops with a traceback.
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


def tracking_uri(runs: Path, uri: str | None) -> str | None:
    """Where MLflow runs are kept: `uri`, else MLFLOW_TRACKING_URI, else SQLite in `runs`; None for "off"."""
    local = f"sqlite:///{(runs.absolute() / 'mlflow.db').as_posix()}"
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or local
    return None if uri == OFF else uri


class _Malformed(ValueError):
    """A run folder that does not hold what a run folder holds; the message names the file."""


class _Status(BaseModel):
    """status.json, as far as it is mirrored."""

    state: RunState
    reason: str | None = None
    attempt: int = 1


class _Point(NamedTuple):
    """One line of the curve; `elapsed` is seconds of training up to it."""

    step: int
    elapsed: float
    figures: dict[str, float]


@dataclass(frozen=True)
class _Record:
    """All that MLflow is told of one run folder. Times are milliseconds since 1970."""

    fingerprint: str
    name: str
    params: dict[str, str]
    status: _Status
    curve: list[_Point]
    figures: dict[str, float]
    artifacts: list[tuple[Path, str | None]]
    started: int
    changed: int
    digest: str


def _read(folder: Path) -> _Record:
    """Raises `_Malformed`."""
    file = folder / "spec.yaml"
    try:
        spec = Spec.from_yaml(file.read_text(encoding="utf-8"))
        started = _milliseconds(file)
        file = folder / "status.json"
        status = _Status.model_validate_json(file.read_bytes())
        changed = _milliseconds(file)
        file = folder / "curve.jsonl"
        curve = list(_curve(file, spec.budget.batch_size))
        file = folder / "result.json"
        result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if result is not None:
            # Written last: where it is present the run is done, whatever its process could still say.
            status = status.model_copy(update={"state": RunState.DONE, "reason": None})
            changed = _milliseconds(file)
        figures = _figures(result) if result is not None else {}
    except ValidationError as error:
        raise _Malformed(str(invalid(error, Spec.model_fields).at(file.name))) from None
    except OSError as error:
        raise _Malformed(f"{file.name}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Malformed(f"{file.name}: {_one_line(f'{type(error).__name__}: {error}')}") from None
    files = [folder / name for name in ("result.json", "spec.yaml", "log.txt", "delta.safetensors")]
    artifacts: list[tuple[Path, str | None]] = [(path, None) for path in files if path.is_file()]
    artifacts += [(path, "samples") for path in sorted(folder.glob("samples/*.png"))]
    return _Record(
        fingerprint=folder.name,
        name=f"{spec.method}/{spec.backbone}/{spec.dataset}/seed{spec.seed}",
        params=_texts(spec.model_dump(mode="json")),
        status=status,
        curve=curve,
        figures=figures,
        artifacts=artifacts if status.state != "running" else [],
        started=started,
        changed=changed,
        digest=digest([status.model_dump(), repr(result), curve[-1].step if curve else None]),
    )


@dataclass(frozen=True)
class _SearchRecord:
    """All that MLflow is told of one search. Times are milliseconds since 1970."""

    name: str
    params: dict[str, str]
    state: RunState
    ended: int
    figures: dict[str, float]
    trials: frozenset[str]
    """Fingerprints."""
    started: int
    changed: int
    digest: str


def _read_search(folder: Path) -> _SearchRecord:
    """Raises `_Malformed`."""
    file = folder / "search.json"
    try:
        definition = json.loads(file.read_bytes())
        params = _texts(definition)
        objectives = list(definition["objectives"])
        started = _milliseconds(file)
        file = folder / "trials.json"
        trials = json.loads(file.read_bytes())
        states = Counter(trial["state"] for trial in trials)
        complete = [trial["values"] for trial in trials if trial["state"] == "complete"]
        fingerprints = frozenset(trial["fingerprint"] for trial in trials)
        changed = _milliseconds(file)
        state = RunState.RUNNING if states["running"] else RunState.DONE
        figures = {f"trials/{state}": float(count) for state, count in states.items()}
        figures["steps"] = float(sum(trial["steps"] for trial in trials))
        for index, name in enumerate(objectives if complete else ()):
            best = max if name == "miou" else min  # the others are costs
            figures[f"best/{name}"] = float(best(values[index] for values in complete))
    except OSError as error:
        raise _Malformed(f"{file.name}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _Malformed(f"{file.name}: {_one_line(f'{type(error).__name__}: {error}')}") from None
    return _SearchRecord(
        name=folder.name,
        params=params,
        state=state,
        ended=len(trials) - states["running"],
        figures=figures,
        trials=fingerprints,
        started=started,
        changed=changed,
        digest=digest([figures, state]),
    )


def _curve(path: Path, batch_size: int) -> Iterator[_Point]:
    """The points of curve.jsonl that are wholly written.

    The file has no clock: the time of a point is reckoned from the throughput. It must follow from the file
    alone, because MLflow takes a point that is sent twice for one only where its time is equal too.
    """
    if not path.exists():
        return
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    elapsed, before = 0.0, 0
    for line in lines:
        figures = dict(_finite(json.loads(line).items()))
        step = int(figures.pop("step"))
        elapsed += max(step - before, 0) * batch_size / (figures.get("images_per_second") or math.inf)
        before = step
        yield _Point(step, elapsed, {f"train/{name}": value for name, value in figures.items()})


def _texts(tree: dict[str, Any]) -> dict[str, str]:
    """Every leaf under its dotted path, as a parameter of an MLflow run."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in _leaves(tree)
        if value is not None
    }
    return {name: text[:_LONGEST_PARAM] for name, text in texts.items()}


def _figures(result: dict[str, Any]) -> dict[str, float]:
    """Every number of result.json under its dotted path (without `metrics.`), and the IoU of each class.

    Spec and provenance are left to the parameters and the artifact: a number in there is not a figure of the run.
    """
    figures = {
        name.removeprefix("metrics."): value
        for name, value in _finite(_leaves(result))
        if not name.startswith(("spec.", "provenance."))
    }
    for index, row in enumerate(result.get("metrics", {}).get("per_class", [])):
        # A slash would open a folder of its own, a dot could name the one above; few other signs are legal.
        name = re.sub(r"[^\w\- ]", "_", row["name"]).strip()[: _LONGEST_KEY - 20] or "class"
        key = f"iou/{name}"
        if key in figures:
            key += f"_{index}"
        figures |= dict(_finite([(key, row["iou"])]))
    return figures


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _finite(values: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, float]]:
    """Numbers only. SQL has neither NaN nor infinity: MLflow stores 0 and 1.8e308 in their place."""
    for name, value in values:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)


class _Store:
    """The experiment `harness` in one MLflow store. Raises whatever MLflow raises."""

    def __init__(self, runs: Path, uri: str) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        if not _is_database(uri):
            self._client = MlflowClient(uri)
            self._experiment = self._find_or_create_experiment()
            return
        runs.mkdir(parents=True, exist_ok=True)
        # Processes that create the schema at the same time make each other fail.
        with FileLock(runs / ".mlflow.lock", timeout=60):
            _ask_database(uri)
            self._client = MlflowClient(uri)
            self._experiment = self._find_or_create_experiment(_artifacts(runs))

    def answers(self) -> bool:
        try:
            return self._client.get_experiment_by_name(EXPERIMENT) is not None
        except Exception:
            return False

    def bring_up_to_date(self, record: _Record | _SearchRecord) -> bool:
        """False where MLflow had all of it already."""
        return self._bring_search(record) if isinstance(record, _SearchRecord) else self._bring_run(record)

    def _bring_run(self, record: _Record) -> bool:
        from mlflow.entities import Metric, Param, RunTag

        run = self._find(record) or self._create(record)
        run_id, tags = run.info.run_id, run.data.tags
        if tags.get(MIRRORED) == record.digest:
            return False
        if LOGGED_STEP not in tags:
            params = [Param(name, text) for name, text in record.params.items()]
            self._client.log_batch(run_id, params=params, tags=[RunTag(LOGGED_STEP, "-1")])

        logged = int(tags.get(LOGGED_STEP, -1))
        points = [point for point in record.curve if point.step > logged]
        size = _LARGEST_BATCH // max([1, *(len(point.figures) for point in points)])
        for start in range(0, len(points), max(size, 1)):
            part = points[start : start + size]
            metrics = [
                Metric(name, value, run.info.start_time + int(1000 * point.elapsed), point.step)
                for point in part
                for name, value in point.figures.items()
            ]
            self._client.log_batch(run_id, metrics, tags=[RunTag(LOGGED_STEP, str(part[-1].step))])

        step = record.curve[-1].step if record.curve else 0
        figures = [Metric(name, value, record.changed, step) for name, value in record.figures.items()]
        for start in range(0, len(figures), _LARGEST_BATCH):
            self._client.log_batch(run_id, figures[start : start + _LARGEST_BATCH])
        for path, place in record.artifacts:
            self._client.log_artifact(run_id, str(path), place)
        self._set_status(run, record.status.state, record.changed)
        last = {STATE: record.status.state.value, REASON: record.status.reason or "", MIRRORED: record.digest}
        self._client.log_batch(run_id, tags=[RunTag(key, text[:_LONGEST_TAG]) for key, text in last.items()])
        return True

    def _bring_search(self, record: _SearchRecord) -> bool:
        from mlflow.entities import Metric, Param, RunTag

        searches = self._all(f"tags.`{SEARCH}` LIKE '%'")
        parent = next((run for run in searches if run.data.tags[SEARCH] == record.name), None)
        if parent is None:
            parent = self._client.create_run(self._experiment, record.started, {SEARCH: record.name}, record.name)
            searches.append(parent)
        run_id = parent.info.run_id
        changed = parent.data.tags.get(MIRRORED) != record.digest
        if changed:
            params = [Param(name, text) for name, text in record.params.items()]
            metrics = [Metric(name, value, record.changed, record.ended) for name, value in record.figures.items()]
            self._client.log_batch(run_id, metrics, params)
            self._set_status(parent, record.state, record.changed)
            tags = {STATE: str(record.state), MIRRORED: record.digest}
            self._client.log_batch(run_id, tags=[RunTag(key, text) for key, text in tags.items()])
        nested = {run.data.tags[FINGERPRINT] for run in self._all(f"tags.`{PARENT}` = '{run_id}'")}
        parents = {run.info.run_id for run in searches}
        for fingerprint in record.trials - nested:
            for run in self._all(f"tags.`{FINGERPRINT}` = '{fingerprint}'"):
                if run.data.tags.get(PARENT) not in parents:  # what two searches share stays with the first
                    self._client.set_tag(run.info.run_id, PARENT, run_id)
                    changed = True
        return changed

    def _all(self, condition: str) -> list[Run]:
        """The runs that meet a condition, the first begun first; of those begun at once, in one order for everybody."""
        found: list[Run] = []
        token: str | None = ""
        while token is not None:
            page = self._client.search_runs([self._experiment], condition, page_token=token or None)
            found += page
            token = page.token or None
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def _set_status(self, run: Run, state: RunState, changed: int) -> None:
        status = RunState(state).mlflow
        if run.info.status == status:
            return
        if status == "RUNNING":
            self._client.update_run(run.info.run_id, status)
        else:
            self._client.set_terminated(run.info.run_id, status, changed)

    def _find(self, record: _Record) -> Run | None:
        """The MLflow run of this attempt. Ends what a dead earlier attempt left running."""
        found = self._client.search_runs(
            [self._experiment], f"tags.`{FINGERPRINT}` = '{record.fingerprint}'", order_by=["start_time ASC"]
        )
        for run in found:
            if int(run.data.tags[ATTEMPT]) < record.status.attempt and run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED", record.changed)
        mine = [run for run in found if run.data.tags[ATTEMPT] == str(record.status.attempt)]
        if not mine:
            return None
        # Two can have come from a run and a `sync` at one moment, or from a request that timed out here but
        # was carried out there. Every process keeps the same one.
        first, *others = sorted(mine, key=lambda run: (run.info.start_time, run.info.run_id))
        for other in others:
            self._client.delete_run(other.info.run_id)
        return first

    def _create(self, record: _Record) -> Run:
        tags = {FINGERPRINT: record.fingerprint, ATTEMPT: str(record.status.attempt)}
        return self._client.create_run(self._experiment, record.started, tags, record.name)

    def _find_or_create_experiment(self, artifacts: str | None = None) -> str:
        from mlflow.exceptions import MlflowException

        if (experiment := self._client.get_experiment_by_name(EXPERIMENT)) is None:
            try:
                return self._client.create_experiment(EXPERIMENT, artifacts)
            except MlflowException:  # a process elsewhere was faster
                if (experiment := self._client.get_experiment_by_name(EXPERIMENT)) is None:
                    raise
        return experiment.experiment_id


def _reach(runs: Path, uri: str) -> _Store:
    try:
        return _Store(runs, uri)
    except Exception as error:
        raise UserError(
            f"--tracking {_without_password(uri)}: cannot be reached ({_reason(error, uri)}); "
            "start or mend it, or name another store"
        ) from error


def _artifacts(runs: Path) -> str:
    return (runs.absolute() / "mlartifacts").as_uri()


def _is_database(uri: str) -> bool:
    return urlsplit(uri).scheme.split("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def _ask_database(uri: str) -> None:
    """Fail at once where no database answers: MLflow itself tries ten times, over 100 s."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _milliseconds(path: Path) -> int:
    return int(path.stat().st_mtime * 1000)


def _without_password(uri: str) -> str:
    place = urlsplit(uri).netloc
    return uri.replace(place, place.rpartition("@")[2], 1) if "@" in place else uri


def _reason(error: BaseException, uri: str) -> str:
    """The innermost cause in one line: what MLflow and its HTTP client wrap around it fills a screen."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return _one_line(str(error) or type(error).__name__).replace(uri, _without_password(uri))


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:199]}…"
