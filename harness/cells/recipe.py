"""A cell in a file, for `harness run --from`: what a search found best, or the `spec.yaml` of a run to be repeated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from harness.cells.resolve import Request
from harness.errors import UserError, did_you_mean
from harness.models.backbones.weights import to_ask_for
from harness.spec import Budget, Spec, budget_from, read_yaml


def write_recipe(request: Request, header: str = "") -> str:
    """The YAML text that `read_recipe` reads; `header` becomes comments in front."""
    values = asdict(request)
    if isinstance(request.budget, Budget):
        values["budget"] = request.budget.model_dump(mode="json")
    comments = "".join(f"# {line}\n" for line in header.splitlines())
    return comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def read_recipe(path: Path, given: Mapping[str, Any]) -> Request:
    """The request in a file, with the fields that the command line gave over it.

    Raises `UserError` that names the file and the field.
    """
    said = f"--from {path}"
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{said}: {os.strerror(error.errno or 0)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{said}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{said}: expected the fields of a cell, such as `method: spm`")
    if "hyperparameters" in values:
        values = _of_spec(values, given, said)
    known = [field.name for field in fields(Request)]
    for name in values:
        if name not in known:
            raise UserError(f"{said}: {name}: no such field; {did_you_mean(str(name), known)}")
    settings = values.pop("settings", None) or {}
    if not isinstance(settings, dict):
        raise UserError(f"{said}: settings: expected hyperparameters, such as `lr: 0.001`")
    if isinstance(values.get("budget"), dict):
        budget = dict(values["budget"])
        values["budget"] = budget_from(budget, str(budget.pop("name", path.stem)), f"{said}: budget")
    for name, value in values.items():
        expected = int if name == "seed" else str
        if not isinstance(value, Budget if name == "budget" and isinstance(value, Budget) else expected):
            raise UserError(f"{said}: {name}: {value!r}: expected {'a number' if expected is int else 'a name'}")
    if values.get("part", "report") not in ("report", "dev"):
        raise UserError(f"{said}: part: {values['part']!r}: give report or dev")
    settings |= given.get("settings", {})
    return Request(**{**values, **given, "settings": settings})


def is_another(path: Path, spec: Spec) -> str | None:
    """What differs between the spec in a file and the one it came to here, which would give other figures.

    None where nothing does, or the file holds no spec.
    """
    try:
        before = Spec.from_yaml(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if before.fingerprint == spec.fingerprint:
        return None
    names = [name for name in Spec.model_fields if getattr(before, name) != getattr(spec, name)]
    return f"this is run {spec.fingerprint}, not {before.fingerprint}: {', '.join(names)} differ"


def _of_spec(values: dict[str, Any], given: Mapping[str, Any], said: str) -> dict[str, Any]:
    """A run's spec as a request. What a spec knows by content alone must be found again by whoever asks."""
    try:
        spec = Spec.model_validate(values)
    except ValueError as error:
        raise UserError(f"{said}: not a whole spec of a run") from error
    weights = to_ask_for(spec.weights) or given.get("weights")
    if weights is None:
        raise UserError(f"{said}: its weights were a file, {spec.weights[:19]}...; give it with --weights")
    kept = spec.model_dump(include={"method", "backbone", "dataset", "head", "seed", "part"})
    return {**kept, "weights": weights, "budget": spec.budget.model_dump(), "settings": spec.hyperparameters}
