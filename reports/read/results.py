"""One run folder as a row of a report: its spec, its state and reason, and its figures, checked field by field."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.errors import UserError, invalid
from harness.models.backbones.packaged import display_name
from harness.runs.folder import RunFolder
from harness.runs.result import RunResult
from harness.runs.store import RunStore
from harness.spec import Budget, Spec
from harness.util.files import digest


@dataclass(frozen=True)
class RunRow:
    """One run, or a cell of the study without one. Figures are None where `state` is not done."""

    fingerprint: str | None
    label: str
    """What a table calls the method: the study's word for it, or its name with what tells its settings apart."""
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
    budget_steps: int | None
    budget_digest: str
    seed: int
    part: str
    state: str
    reason: str | None = None
    miou: float | None = None
    macc: float | None = None
    aacc: float | None = None
    mdice: float | None = None
    absent_classes: int | None = None
    trained_method: int | None = None
    trained_head: int | None = None
    trained: int | None = None
    backbone_parameters: int | None = None
    delta_bytes: int | None = None
    peak_memory_bytes: int | None = None
    train_seconds: float | None = None
    images_per_second: float | None = None
    data_wait: float | None = None
    train_flops: int | None = None
    inference_ratio: float | None = None
    commit: str | None = None
    dirty: bool | None = None
    device: str | None = None
    path: str | None = None


def read_run(run: RunFolder, store: RunStore) -> tuple[Spec, RunResult | None, str, str | None]:
    """A run's spec, its result where it is done, its state and the reason. Raises `UserError` where it has no spec."""
    outcome = store.outcome(run)
    result = run.result()
    if result is not None:
        return result.spec, result, outcome.state.value, outcome.reason
    reason = outcome.reason and str(outcome.reason).encode("utf-8", "replace").decode()  # no lone surrogates
    return run.spec(), None, outcome.state.value, reason


def row_of_run(run: RunFolder, spec: Spec, result: RunResult | None, state: str, reason: str | None) -> RunRow:
    row = row_of_spec(spec, state, reason, fingerprint=run.fingerprint, path=str(run.path))
    if result is None:
        return row
    return replace(
        row,
        **result.metrics.model_dump(exclude={"per_class"}),
        trained_method=result.parameters.method,
        trained_head=result.parameters.head,
        trained=result.parameters.trainable,
        backbone_parameters=result.parameters.backbone,
        inference_ratio=result.inference.ratio,
        **result.model_dump(
            include={
                "delta_bytes",
                "peak_memory_bytes",
                "train_seconds",
                "images_per_second",
                "data_wait",
                "train_flops",
            }
        ),
        **result.provenance.model_dump(include={"commit", "dirty", "device"}),
    )


def row_of_spec(spec: Spec, state: str, reason: str | None, **more: Any) -> RunRow:
    return RunRow(
        label=spec.method,
        hyperparameters=json.dumps(spec.hyperparameters, sort_keys=True),
        **facets_of_budget(spec.budget),
        state=state,
        reason=reason,
        backbone=display_name(spec.backbone, spec.weights),
        **spec.model_dump(exclude={"hyperparameters", "budget", "backbone"}),
        **more,
    )


def facets_of_budget(budget: Budget) -> dict[str, Any]:
    return {
        "budget": budget.name,
        "budget_steps": budget.steps,
        "budget_digest": digest(budget.identity()),
    }


def read_json(path: Path, kind: Any) -> Any:
    """Raises `UserError` that names the file, without its folder, where it does not hold a `kind`."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path.name}: {error.strerror}") from error
    except ValidationError as error:
        raise invalid(error).at(path.name) from error
