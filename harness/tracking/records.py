"""What MLflow shows of a run folder or a search's folder, as plain values. Nothing is written here.

`mlflow_store.py` sends the records to MLflow. Times are milliseconds since 1970.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from harness.errors import UserError, invalid
from harness.runs.folder import RunFolder
from harness.runs.result import MEASURES_BY_NAME, RunResult
from harness.runs.state import Outcome, RunState
from harness.spec import PROTOCOL, Spec
from harness.util.files import digest
from harness.util.text import one_line

FINGERPRINT, ATTEMPT = "harness.fingerprint", "harness.attempt"
SEARCH = "harness.search"
"""Tags that identify an MLflow run: an attempt at a run, or the search of that name."""

_LONGEST_PARAM, _LONGEST_KEY = 6000, 250  # characters


class MalformedFolder(ValueError):
    """A folder that cannot be mirrored; the message names the file in it."""


class MetricRow(NamedTuple):
    """In the order of MLflow's `Metric`."""

    name: str
    value: float
    milliseconds: int
    step: int


@dataclass(frozen=True)
class MLflowRecord:
    """One MLflow run: one attempt at a run, or a whole search."""

    identity: dict[str, str]
    """Tags that identify the MLflow run together."""
    name: str
    outcome: Outcome
    params: dict[str, str]
    curve: list[MetricRow]
    values: list[MetricRow]
    """The numbers of the result."""
    artifacts: list[tuple[Path, str | None]]
    """Each file with its folder in MLflow."""
    started: int
    changed: int
    trials: frozenset[str] = frozenset()
    """For a search: the fingerprints of the runs that are nested under it."""

    @property
    def attempt(self) -> int:
        return int(self.identity.get(ATTEMPT, 1))

    @property
    def last_step(self) -> int:
        """The last step of the curve; 0 before its first point."""
        return self.curve[-1].step if self.curve else 0

    @property
    def digest(self) -> str:
        values = [(row.name, row.value) for row in self.values]
        return digest([self.outcome.state, self.outcome.reason, values, self.last_step])


def read_run(run: RunFolder, outcome: Outcome) -> MLflowRecord:
    """Raises `MalformedFolder` if files are missing that the state `outcome` requires."""
    try:
        spec = Spec.from_yaml(run.spec_path.read_text(encoding="utf-8"))
        if spec.protocol == PROTOCOL and spec.fingerprint != run.fingerprint:
            raise ValueError(f"is that of run {spec.fingerprint}")
    except OSError as error:
        raise MalformedFolder(f"{run.spec_path.name}: {error.strerror or error}") from None
    except ValidationError as error:
        raise MalformedFolder(str(invalid(error, Spec.model_fields).at(run.spec_path.name))) from None
    except ValueError as error:
        raise MalformedFolder(f"{run.spec_path.name}: {one_line(str(error))}") from None
    status = run.status()
    if outcome.state is RunState.DAMAGED or status is None:
        raise MalformedFolder(outcome.reason or f"{run.status_path.name}: missing or damaged")
    started = _milliseconds(run.spec_path)
    curve = list(_curve(run.curve(), spec.budget.batch_size, started))
    try:
        result = run.read_result() if outcome.state is RunState.DONE else None
    except UserError as error:
        raise MalformedFolder(str(error)) from None
    changed = _milliseconds(run.status_path if result is None else run.result_path)
    step = curve[-1].step if curve else 0
    values = _result_values(result) if result is not None else {}
    return MLflowRecord(
        identity={FINGERPRINT: run.fingerprint, ATTEMPT: str(status.attempt)},
        name=f"{spec.method}/{spec.backbone}/{spec.dataset}/seed{spec.seed}",
        outcome=outcome,
        params=_params(spec.model_dump(mode="json")),
        curve=curve,
        values=[MetricRow(name, value, changed, step) for name, value in values.items()],
        artifacts=[] if outcome.state is RunState.RUNNING else _artifacts(run),
        started=started,
        changed=changed,
    )


def read_search(folder: Path, is_executed: Callable[[str], bool]) -> MLflowRecord:
    """`is_executed`: whether a process executes the run of this fingerprint, which decides about unfinished trials.

    Raises `MalformedFolder`.
    """
    file = folder / "search.json"
    try:
        definition = json.loads(file.read_bytes())
        objectives = [MEASURES_BY_NAME[name] for name in definition["objectives"]]
        started = _milliseconds(file)
        file = folder / "trials.json"
        trials = json.loads(file.read_bytes())
        changed = _milliseconds(file)
        states = Counter(trial["state"] for trial in trials)
        values = {f"trials/{state}": float(count) for state, count in states.items()}
        values["steps"] = float(sum(trial["steps"] for trial in trials))
        complete = [trial["values"] for trial in trials if trial["state"] == "complete"]
        for index, objective in enumerate(objectives if complete else ()):
            best = max if objective.better == "higher" else min
            values[f"best/{objective.name}"] = float(best(scores[index] for scores in complete))
        runs = {number: (trial["fingerprint"], *trial.get("others", ())) for number, trial in enumerate(trials)}
        fingerprints = frozenset(itertools.chain.from_iterable(runs.values()))
        unfinished = [runs[number] for number, trial in enumerate(trials) if trial["state"] == "running"]
    except OSError as error:
        raise MalformedFolder(f"{file.name}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise MalformedFolder(f"{file.name}: {one_line(f'{type(error).__name__}: {error}')}") from None
    if not unfinished:
        outcome = Outcome(RunState.DONE)
    elif any(map(is_executed, itertools.chain.from_iterable(unfinished))):
        outcome = Outcome(RunState.RUNNING)
    else:
        outcome = Outcome(RunState.INTERRUPTED, f"stopped or killed with {len(unfinished)} unfinished trials")
    ended = len(trials) - len(unfinished)
    return MLflowRecord(
        identity={SEARCH: folder.name},
        name=folder.name,
        outcome=outcome,
        params=_params(definition),
        curve=[],
        values=[MetricRow(name, value, changed, ended) for name, value in values.items()],
        artifacts=[],
        started=started,
        changed=changed,
        trials=fingerprints,
    )


def _artifacts(run: RunFolder) -> list[tuple[Path, str | None]]:
    files = (run.result_path, run.spec_path, run.log_path, run.delta_path)
    samples = [] if run.samples_path.is_symlink() else sorted(run.samples_path.glob("*.png"))
    found = [*((path, None) for path in files), *((path, "samples") for path in samples)]
    return [(path, folder) for path, folder in found if path.is_file() and not path.is_symlink()]  # follows no links


def _curve(points: Iterable[dict[str, Any]], batch_size: int, started: int) -> Iterator[MetricRow]:
    """The curve file has no timestamps: they are derived from the throughput, so that they are always the same: MLflow
    only ignores a repeated point if its time is equal too.
    """
    seconds, last_step = 0.0, 0
    for point in points:
        values = dict(_finite(point.items()))
        step = int(values.pop("step"))
        seconds += max(step - last_step, 0) * batch_size / (values.get("images_per_second") or math.inf)
        last_step = step
        for name, value in values.items():
            yield MetricRow(f"train/{name}", value, started + int(1000 * seconds), step)


def _params(fields: dict[str, Any]) -> dict[str, str]:
    """Every leaf under its dotted path, as text."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in _leaves(fields)
        if value is not None
    }
    return {name: text[:_LONGEST_PARAM] for name, text in texts.items()}


def _result_values(result: RunResult) -> dict[str, float]:
    """Every number of a result under its dotted path, scores without `metrics.`, and the IoU of each class."""
    fields = result.model_dump(exclude={"spec": True, "provenance": True, "metrics": {"per_class"}})
    values = {name.removeprefix("metrics."): value for name, value in _finite(_leaves(fields))}
    for index, scores in enumerate(result.metrics.per_class):
        # MLflow reads a slash as a folder and two dots as its parent; few other characters are allowed.
        name = re.sub(r"[^\w\- ]", "_", scores.name).strip()[: _LONGEST_KEY - 20] or "class"
        key = f"iou/{name}"
        if key in values:
            key += f"_{index}"
        values |= dict(_finite([(key, scores.iou)]))
    return values


def _leaves(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _finite(values: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, float]]:
    """Drop NaN and infinity, which SQL does not have: MLflow would store 0 and 1.8e308."""
    for name, value in values:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)


def _milliseconds(path: Path) -> int:
    return int(path.stat().st_mtime * 1000)
