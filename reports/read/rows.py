"""One run folder as a row of a report: its spec, outcome and result. `frames.py` makes frames from rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.errors import UserError, invalid
from harness.models.backbones.packaged import display_name
from harness.runs.folder import RunFolder
from harness.runs.result import RunResult
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.spec import PROTOCOL, Budget, Spec
from harness.util.files import digest

MISSING = "missing"
"""What a report calls a cell of the study that has no run yet."""


def state_name(state: RunState) -> str:
    """The state's name in the column `state` of a report's data."""
    return MISSING if state in (RunState.TO_DO, RunState.WAITING) else state.value


def state_label(name: str) -> str:
    """The label of such a name in tables."""
    return name if name == MISSING else RunState(name).label


_BETWEEN_WARNINGS = " | "


def split_warnings(columns: Iterable[str]) -> list[str]:
    """The warnings in values of `RunRow.warnings`, each once."""
    texts = (text for column in columns for text in column.split(_BETWEEN_WARNINGS))
    return [text for text in dict.fromkeys(texts) if text]


@dataclass(frozen=True)
class RunRow:
    """One run, or a cell of the study without one."""

    fingerprint: str | None
    label: str
    """The method in tables: the study's label, or the method's name with the hyperparameters that differ."""
    method: str
    hyperparameters: str
    """JSON."""
    method_code: str
    backbone: str
    weights: str
    dataset: str
    data_digest: str
    head: str
    budget: str
    budget_steps: int
    budget_digest: str
    seed: int
    part: str
    state: RunState
    reason: str | None = None
    doubts: str = ""
    """What to know of a study's search, as text: a range of the row's own, values at an edge of their range."""
    path: str | None = None
    """Of its folder; None for a cell without a run."""
    result: RunResult | None = None
    """None unless the run is done."""

    @property
    def unlabelled(self) -> str:
        """The classes without a label in the evaluated images, as text."""
        return "" if self.result is None else ", ".join(self.result.metrics.unlabelled)

    @property
    def only_found(self) -> str:
        """The only class of which a pixel is predicted right; empty where there are several, or none."""
        return (self.result.metrics.only_found if self.result else None) or ""

    @property
    def warnings(self) -> str:
        """What is odd about the dataset or the weights, as one text; see `split_warnings`."""
        return "" if self.result is None else _BETWEEN_WARNINGS.join(self.result.warnings)


def read_row(run: RunFolder, store: RunStore) -> RunRow:
    """Raises `UserError` where the folder has no complete spec, or one of another protocol."""
    outcome, result = store.read(run)
    spec = result.spec if result else run.spec()
    if spec.protocol != PROTOCOL:
        problem = f"made by protocol {spec.protocol}; its score does not compare with those of protocol {PROTOCOL}"
        raise UserError(f"{problem}: run it again")
    return row_of_spec(spec, outcome, fingerprint=run.fingerprint, path=str(run.path), result=result)


def row_of_spec(spec: Spec, outcome: Outcome, **fields: Any) -> RunRow:
    """`fields` are those of `RunRow` that no spec holds."""
    reason = outcome.reason and outcome.reason.encode("utf-8", "replace").decode()  # no lone surrogates
    return RunRow(
        label=spec.method,
        hyperparameters=json.dumps(spec.hyperparameters, sort_keys=True),
        **budget_fields(spec.budget),
        state=outcome.state,
        reason=reason,
        backbone=display_name(spec.backbone, spec.weights),
        **spec.model_dump(exclude={"hyperparameters", "budget", "backbone", "protocol"}),
        **fields,
    )


def budget_fields(budget: Budget) -> dict[str, Any]:
    return {"budget": budget.name, "budget_steps": budget.steps, "budget_digest": digest(budget.identity())}


def read_json(path: Path, kind: Any) -> Any:
    """Raises `UserError` that names the file, without its folder, where it does not hold a `kind`."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path.name}: {error.strerror}") from error
    except ValidationError as error:
        raise invalid(error).at(path.name) from error
