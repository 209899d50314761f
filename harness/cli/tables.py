"""Tables on the terminal: aligned columns, one line per run, one line per hyperparameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import UserError, printable
from harness.runs.result import COSTS, METRICS, Measure, RunResult, Scores, about_only_found
from harness.spec import PROTOCOL, Spec
from harness.util.text import list_some

if TYPE_CHECKING:
    from harness.cli.listing import ListedRun

RUN_MEASURES: dict[str, Measure] = {
    "mIoU": METRICS["miou"],
    "trained": COSTS["trained"],
    "by method": COSTS["trained_method"],
    "delta": COSTS["delta_bytes"],
    "time": COSTS["train_seconds"],
}
"""Heading -> measure, in the table of runs."""

_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "pattern": "~"}


def print_table(rows: list[dict[str, str]], indent: str = "") -> None:
    """Aligned columns, numbers right-aligned. Nothing is truncated to the terminal's width."""
    if not rows:
        print("none")
        return
    columns = list(rows[0])
    rows = [{column: printable(text) for column, text in row.items()} for row in rows]
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    right = {column for column in columns if all(row[column][:1] in "0123456789-" for row in rows)} - {"run", "state"}
    for row in ({column: column for column in columns}, *rows):
        cells = (row[c].rjust(widths[c]) if c in right else row[c].ljust(widths[c]) for c in columns)
        print(indent + "  ".join(cells).rstrip())


def run_row(run: ListedRun) -> dict[str, str]:
    """One row of the table of runs: the cell, its metric and costs, and its state."""
    from harness.models.backbones.packaged import display_name

    spec = run.spec
    if spec is None:
        cell = dict.fromkeys(("method", "backbone", "dataset", "head", "budget", "seed"), "?")
    else:
        cell = {
            "method": spec.method + _changes(spec) + _older(spec),
            "backbone": display_name(spec.backbone, spec.weights),
            "dataset": spec.dataset + ("" if spec.part == "report" else " (dev)"),
            "head": spec.head,
            "budget": spec.budget.name,
            "seed": str(spec.seed),
        }
    values = {heading: _value(measure, run.result) for heading, measure in RUN_MEASURES.items()}
    scores = None if run.result is None else run.result.metrics
    return {"run": run.fingerprint, **cell, **values, "state": str(run.outcome) + about_classes([scores])}


def about_classes(runs: Sequence[Scores | None]) -> str:
    """The end of the state of one or several runs on the same images, None for one without scores: classes without a
    label in these images, and runs that find a single class."""
    unlabelled = next((scores.unlabelled for scores in runs if scores), ())
    only = about_only_found([scores.only_found if scores else None for scores in runs])
    return (f", no label of {list_some(unlabelled)}" if unlabelled else "") + (f", {only}" if only else "")


def hyperparameter_row(described: dict[str, Any]) -> dict[str, str]:
    """One of a method's hyperparameters, as `--set` accepts it."""
    bounds = [f"{_SIGNS.get(key, key)} {plain(value)}" for key, value in described["bounds"].items()]
    return {
        "--set": described["name"],
        "default": plain(described["default"]),
        "type": described["type"],
        "bounds": ", ".join(bounds),
        "search": plain(described["search"]),
        "help": described["help"],
    }


def plain(value: Any) -> str:
    """A row's value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _value(measure: Measure, result: RunResult | None) -> str:
    value = None if result is None else measure.of(result)
    if value is None:
        return "-"
    match measure.unit:
        case "share":
            return f"{value:.4f}"
        case "bytes":
            return f"{value / 2**20:.2f} MiB"
        case "seconds":
            return f"{value:.0f} s"
        case "count":
            return f"{value:,}"
        case _:
            return f"{value:.3g}"


def _older(spec: Spec) -> str:
    """Marks runs whose scores do not compare with those of this version."""
    return "" if spec.protocol == PROTOCOL else f" [protocol {spec.protocol}]"


def _changes(spec: Spec) -> str:
    """The hyperparameters that differ from the method's defaults: they distinguish two rows of one method."""
    from harness.method import methods

    try:
        fields = methods.get(spec.method).Hyperparameters.model_fields
    except UserError:
        return ""
    changed = [
        f"{name}={value}"
        for name, value in spec.hyperparameters.items()
        if name not in fields or fields[name].default != value
    ]
    return f"({', '.join(changed)})" if changed else ""
