"""A cell in a file, for `harness run --from`: the best trial of a search, or the `spec.yaml` of a run to repeat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from harness.cells.resolve import Request
from harness.errors import UserError, did_you_mean, located
from harness.models.backbones.weights import to_ask_for
from harness.spec import Budget, Spec, budget_from
from harness.util.files import read_yaml_file


def write_recipe(request: Request, header: str = "") -> str:
    """The YAML text that `read_recipe` reads; `header` becomes comments in front."""
    values = asdict(request)
    if isinstance(request.budget, Budget):
        values["budget"] = request.budget.model_dump(mode="json")
    comments = "".join(f"# {line}\n" for line in header.splitlines())
    return comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def read_recipe(path: Path, flags: Mapping[str, Any]) -> Request:
    """The request in a file; the fields in `flags`, from the command line, take precedence.

    Raises `UserError` that names the file and the field. Whether the names in it exist is checked when the request is
    resolved: see `located_in_recipe`.
    """
    values = read_yaml_file(path, "from")
    with located(path):
        if not isinstance(values, dict):
            raise UserError("expected the fields of a cell, such as `method: spm`")
        if "hyperparameters" in values:
            values = _fields_of_spec(values, flags)
        known = [field.name for field in fields(Request)]
        for name in values:
            if name not in known:
                raise UserError("no such field", field=str(name), hint=did_you_mean(str(name), known))
        settings = values.pop("settings", None) or {}
        if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
            raise UserError("expected hyperparameters, such as `lr: 0.001`", field="settings", value=settings)
        if isinstance(values.get("budget"), dict):
            budget = dict(values["budget"])
            with located(under="budget"):
                values["budget"] = budget_from(budget, str(budget.pop("name", path.stem)))
        seed = values.get("seed", 0)
        if isinstance(seed, bool) or (isinstance(seed, int) and not 0 <= seed < 2**31):
            raise UserError("use a number from 0 to 2147483647", field="seed", value=seed)
        for name, value in values.items():
            if not isinstance(value, int if name == "seed" else (str, Budget) if name == "budget" else str):
                raise UserError(f"expected a {'number' if name == 'seed' else 'name'}", field=name, value=value)
        if values.get("part", "report") not in ("report", "dev"):
            raise UserError("use report or dev", field="part", value=values["part"])
    settings |= flags.get("settings", {})
    return Request(**{**values, **flags, "settings": settings})


@contextmanager
def located_in_recipe(path: Path, flags: Mapping[str, Any]) -> Iterator[None]:
    """Errors raised inside name the file, except for fields that are in `flags`."""
    by_flag = {"from", *flags, *(f"settings.{name}" for name in flags.get("settings", {}))}
    try:
        yield
    except UserError as error:
        if error.field is not None and error.field not in by_flag:
            error.at(path)
        raise


def difference(path: Path, spec: Spec) -> str | None:
    """How the spec in a recipe differs from the `spec` it was resolved to here, if their fingerprints differ.

    None if they do not differ, or if the file holds no spec.
    """
    try:
        recorded = Spec.from_yaml(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if recorded.fingerprint == spec.fingerprint:
        return None
    names = [name for name in Spec.model_fields if getattr(recorded, name) != getattr(spec, name)]
    return f"resolved to run {spec.fingerprint}, not {recorded.fingerprint}: {', '.join(names)} differ"


def _fields_of_spec(values: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A run's spec as fields of a request. Weights that were a file must be in `flags`: a spec has only their hash."""
    try:
        spec = Spec.model_validate(values)
    except ValueError as error:
        raise UserError("not the complete spec of a run") from error
    weights = to_ask_for(spec.weights) or flags.get("weights")
    if weights is None:
        problem, hint = f"{spec.weights[:19]}... is the hash of a file", "pass the file with --weights"
        raise UserError(problem, field="weights", hint=hint)
    same = spec.model_dump(include={"method", "backbone", "dataset", "head", "seed", "part"})
    return {**same, "weights": weights, "budget": spec.budget.model_dump(), "settings": spec.hyperparameters}
