"""One run folder as a row of a report: its spec, its state and reason, and its figures, checked field by field."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from harness.backbones.packaged import told_name
from harness.errors import UserError
from harness.files import digest
from harness.runs import RunFolder, RunStore
from harness.spec import Budget, Spec, first_problem


@dataclass(frozen=True)
class Row:
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


class _Part(BaseModel):
    """Of a `result.json`; what a later version adds to one is let be."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


Share = float | None


class ClassFigures(_Part):
    name: str
    iou: Share = Field(ge=0, le=1)
    acc: Share = Field(ge=0, le=1)
    dice: Share = Field(ge=0, le=1)


class Figures(_Part):
    miou: Share = Field(ge=0, le=1)
    macc: Share = Field(ge=0, le=1)
    aacc: Share = Field(ge=0, le=1)
    mdice: Share = Field(ge=0, le=1)
    absent_classes: int = Field(ge=0)
    per_class: list[ClassFigures]


class Parameters(_Part):
    method: int = Field(ge=0)
    head: int = Field(ge=0)
    trainable: int = Field(ge=0)
    backbone: int = Field(ge=0)


class Inference(_Part):
    ratio: float = Field(gt=0)


class Provenance(_Part):
    commit: str | None = None
    dirty: bool | None = None
    device: str | None = None


class Result(_Part):
    """What a report takes from a `result.json`."""

    status: Literal["done"]
    fingerprint: str
    spec: Spec
    metrics: Figures
    parameters: Parameters
    delta_bytes: int = Field(ge=0)
    train_seconds: float = Field(ge=0)
    images_per_second: float = Field(ge=0)
    data_wait: float = Field(ge=0)
    peak_memory_bytes: int | None
    train_flops: int | None
    inference: Inference
    provenance: Provenance


def read_run(run: RunFolder, store: RunStore) -> tuple[Spec, Result | None, str, str | None]:
    """A run's spec, its result where it is done, its state and the reason. Raises `UserError` where it has no spec."""
    if run.result_path.exists():
        try:
            result: Result = read_json(run.result_path, Result)
        except UserError as error:
            return run.spec(), None, "damaged", str(error)
        if result.fingerprint != run.fingerprint:
            return run.spec(), None, "damaged", f"result.json: is of run {result.fingerprint}"
        return result.spec, result, "done", None
    status = store.status(run)
    if status is None:
        return run.spec(), None, "damaged", "its status.json is missing or damaged"
    if status.state == "done":
        return run.spec(), None, "damaged", "its result.json is missing"
    reason = status.reason and str(status.reason).encode("utf-8", "replace").decode()  # no lone surrogates
    return run.spec(), None, status.state, reason


def row_of_run(run: RunFolder, spec: Spec, result: Result | None, state: str, reason: str | None) -> Row:
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
        **result.provenance.model_dump(),
    )


def row_of_spec(spec: Spec, state: str, reason: str | None, **more: Any) -> Row:
    return Row(
        label=spec.method,
        hyperparameters=json.dumps(spec.hyperparameters, sort_keys=True),
        **facets_of_budget(spec.budget),
        state=state,
        reason=reason,
        backbone=told_name(spec.backbone, spec.weights),
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
        raise UserError(f"{path.name}: {first_problem(error, ())}") from error
