"""The fields of files that people write and of files that a run leaves, from the models that check them."""

from __future__ import annotations

import inspect
import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from markup import code, escaped, plain_value, table
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from harness.data.description import Description, Splits
from harness.runs.result import (
    MEASURES,
    ClassScores,
    Inference,
    Parameters,
    Provenance,
    Reuse,
    RunResult,
    Scores,
)
from harness.spec import Budget, Spec, budgets
from studies.study import BackboneArm, MethodArm, Override, Study
from studies.tune import HeadTune, Tune


def study() -> str:
    parts: list[tuple[str, type[BaseModel]]] = [
        ("## Top level", Study),
        ("## A row of `methods`", MethodArm),
        ("## An entry of `backbones`", BackboneArm),
        ("## `tune`", Tune),
        ("## `tune.head`", HeadTune),
        ("## An entry of `overrides`", Override),
    ]
    return "\n\n".join(f"{title}\n\n{_intro(model)}{model_table(model)}" for title, model in parts)


def budget() -> str:
    rows = model_rows(Budget, leave_out={"name"})
    base = (code("base"), code("str"), "", "a shipped budget to start from; the other fields replace its own")
    return table(_HEADINGS, [base, *rows])


def shipped_budgets() -> str:
    """The fields in which the shipped budgets differ, one column a budget."""
    shipped = {name: found.model_dump(mode="json") for name, found in budgets().items()}
    names = [name for name in Budget.model_fields if name != "name"]
    rows = []
    for name in names:
        values = [plain_value(fields[name]) for fields in shipped.values()]
        if len(set(values)) > 1:
            rows.append((code(name), *values))
    return table(("field", *(code(name) for name in shipped)), rows)


def dataset() -> str:
    return f"{model_table(Description)}\n\n## `splits`\n\n{_intro(Splits)}{model_table(Splits)}"


def spec() -> str:
    return output_table(Spec)


def result() -> str:
    parts = [output_table(RunResult, "[`spec.yaml`](run-folder.md#specyaml)")]
    for name, model in (
        ("metrics", Scores),
        ("metrics.per_class[]", ClassScores),
        ("parameters", Parameters),
        ("inference", Inference),
        ("reuse", Reuse),
        ("provenance", Provenance),
    ):
        parts.append(f"## `{name}`\n\n{_intro(model)}{output_table(model)}")
    return "\n\n".join(parts)


def measures() -> str:
    """What tables, plots and searches call the numbers of a result."""
    rows = [
        (code(one.key), escaped(one.title), one.unit, one.better, code(one.name or ""), code(one.column or ""))
        for one in MEASURES.values()
    ]
    return table(("column of data files", "title", "unit", "better", "`--objective`", "`--columns`"), rows)


# ---- one model -------------------------------------------------------------------------------------------------------

_HEADINGS = ("field", "type", "default", "meaning")


def model_table(model: type[BaseModel]) -> str:
    return table(_HEADINGS, model_rows(model))


def output_table(model: type[BaseModel], spec: str = "") -> str:
    """Without defaults and bounds: nobody writes these fields. `spec`: where the fields of a spec are described."""
    rows = []
    for name, field in model.model_fields.items():
        kind = shown_type(field.annotation)
        meaning = escaped((field.description or "").replace("None:", "null:"))
        if kind == "fields" and not meaning:
            elsewhere = {"spec": spec, "budget": "[Budget](budget.md)"}
            meaning = elsewhere.get(name, f"[below](#{name})")
        rows.append((code(name), code(kind), meaning))
    return table(("field", "type", "meaning"), rows)


def model_rows(model: type[BaseModel], leave_out: set[str] | None = None) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning with bounds of each field."""
    rows = []
    for name, field in model.model_fields.items():
        if name in (leave_out or ()) or field.exclude:
            continue
        required = field.is_required() or field.default is PydanticUndefined
        default = "required" if field.is_required() else "" if required else _default(field.default)
        bounds = _bounds(field.metadata)
        meaning = "; ".join(filter(None, (escaped(field.description or ""), bounds)))
        rows.append((code(name), code(shown_type(field.annotation)), default, meaning))
    return rows


def _intro(model: type[BaseModel]) -> str:
    """The model's docstring as a paragraph, if it has one of its own."""
    text = model.__dict__.get("__doc__") or ""
    return f"{escaped(inspect.cleandoc(text))}\n\n" if text else ""


def _default(value: Any) -> str:
    if value is None or isinstance(value, BaseModel):
        return ""
    value = list(value) if isinstance(value, tuple) else value
    return "empty" if value in ("", [], {}) else code(plain_value(value))


def _bounds(metadata: list[Any]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥", "max_length": "length ≤"}
    found = [(name, getattr(one, name)) for one in metadata for name in signs if hasattr(one, name)]
    texts = [
        f"{signs[name]} {value:,}" if isinstance(value, int) else f"{signs[name]} {value}" for name, value in found
    ]
    return escaped(", ".join(texts))


def shown_type(annotation: Any) -> str:
    """A type as people write it: `list of int`, `float or null`, `whole or slide`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return "any"
    if origin is Annotated:
        return shown_type(arguments[0])
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(shown_type(one) for one in arguments))
    if origin is tuple:
        inner = [shown_type(one) for one in arguments if one is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "fields"
    if annotation is type(None):
        return "null"
    if origin is re.Pattern:
        return "regular expression"
    return getattr(annotation, "__name__", str(annotation))
