"""Rows of runs as frames, with the setting of each run and the names that settings and methods have in a report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.method import methods
from harness.runs.folder import RunFolder
from harness.runs.result import COSTS, MEASURES, METRICS, RunResult
from harness.util.files import digest
from reports.read.rows import RunRow, state_name

FACETS = ["dataset", "data_digest", "backbone", "weights", "head", "budget", "budget_steps", "budget_digest", "part"]
"""A setting: the fields that are equal for all rows of one block of a table, or of one panel of a plot."""

_FROM_SPEC = [field.name for field in fields(RunRow) if field.name not in ("path", "result")]
_REMARKS = ["unlabelled", "only_found", "warnings"]
_COLUMNS = [
    *(*_FROM_SPEC, *METRICS, "absent_classes", *COSTS, "data_wait"),
    *("commit", "dirty", "device", *_REMARKS, "path"),
]
_INTEGERS = ["budget_steps", "absent_classes", *(key for key, measure in MEASURES.items() if measure.integer)]
_FLOATS = ["data_wait", *(key for key, measure in MEASURES.items() if not measure.integer)]


def rows_of(frame: pd.DataFrame) -> Iterator[Any]:
    """`itertuples`, without the types of cells that pandas' stubs give it: a column's type is not known to them."""
    return iter(frame.itertuples())


def frame_of_runs(rows: list[RunRow], labelled: bool) -> pd.DataFrame:
    """The frame that `Collected.runs` describes; `labelled`: the labels are a study's and stay as they are."""
    runs = pd.DataFrame([_record(row) for row in rows], columns=_COLUMNS)
    runs = runs.astype({**dict.fromkeys(_INTEGERS, "Int64"), **dict.fromkeys(_FLOATS, float)})
    keys = [name for name in FACETS if name != "budget"]
    runs["setting"] = [digest([str(value) for value in row])[:8] for row in runs[keys].itertuples(index=False)]
    runs["setting_name"] = _setting_names(runs)
    if not labelled:
        runs["label"] = _labels(runs)
    order = [*FACETS, "setting", "label", "hyperparameters", "method_code", "seed", "fingerprint"]
    return runs.sort_values(order, kind="stable", ignore_index=True)


def _record(row: RunRow) -> dict[str, Any]:
    record = {name: getattr(row, name) for name in (*_FROM_SPEC, *_REMARKS)}
    record |= {"state": state_name(row.state), "path": row.path}
    if row.result is not None:
        record |= {key: measure.of(row.result) for key, measure in MEASURES.items()}
        record |= {"absent_classes": row.result.metrics.absent_classes, "data_wait": row.result.data_wait}
        record |= row.result.provenance.model_dump(include={"commit", "dirty", "device"})
    return record


def _setting_names(runs: pd.DataFrame) -> list[str]:
    """Backbone, dataset, head and budget, and as much of the rest as distinguishes a setting from the others."""
    facets = runs.drop_duplicates("setting").set_index("setting")[FACETS]
    names = {setting: ", ".join(row[["backbone", "dataset", "head", "budget"]]) for setting, row in facets.iterrows()}
    for setting, row in facets.iterrows():
        if row["weights"] == "random":
            names[setting] += ", random weights"
        elif row["part"] != "report":
            names[setting] += f", {row['part']} split"
    for facet, suffix in (
        ("part", "{} split"),
        ("budget_steps", "{} steps"),
        ("weights", "weights {}"),
        ("data_digest", "data {:.8}"),
        ("budget_digest", "budget {:.8}"),
    ):
        same_name = pd.Series(names).groupby(names).groups
        for settings in same_name.values():
            if facets.loc[settings, facet].nunique() > 1:
                for setting in settings:
                    names[setting] += ", " + suffix.format(facets.loc[setting, facet])
    return [names[setting] for setting in runs["setting"]]


def _labels(runs: pd.DataFrame) -> list[str]:
    """The method's name; where a setting holds several hyperparameter sets of it, with the values that differ."""
    labels = list(runs["method"])
    for (_, method), group in runs.groupby(["setting", "method"]):
        sets = [json.loads(text) | ({"code": code[:8]} if code else {})
                for text, code in zip(group["hyperparameters"], group["method_code"], strict=True)]  # fmt: skip
        names = sorted({name for values in sets for name in values})
        varied = [name for name in names if len({json.dumps(values.get(name)) for values in sets}) > 1]
        defaults = _defaults(method)
        changes = [[(name, values[name]) for name in varied if name in values and values[name] != defaults.get(name)]
                   for values in sets]  # fmt: skip
        texts = [", ".join(f"{name}={_brief(value)}" for name, value in pairs) for pairs in changes]
        if len(set(texts)) < len({str(pairs) for pairs in changes}):  # they only differ in their last digits
            texts = [", ".join(f"{name}={value}" for name, value in pairs) for pairs in changes]
        for index, text in zip(group.index, texts, strict=True):
            labels[index] += f"({text})" if text else ""
    return labels


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _defaults(method: str) -> dict[str, Any]:
    """The defaults of an installed method's hyperparameters; empty for another method."""
    try:
        return {name: field.default for name, field in methods.get(method).Hyperparameters.model_fields.items()}
    except UserError:
        return {}


def frame_of_classes(root: Path, results: Mapping[str, RunResult]) -> pd.DataFrame:
    """One row per run and class: fingerprint, index, name, iou, acc, dice, colour ("#rrggbb" or None)."""
    palettes: dict[str, list[str]] = {}
    rows = []
    for fingerprint, result in results.items():
        data = result.spec.data_digest
        if not palettes.get(data):
            palettes[data] = _palette(RunFolder(root / fingerprint).delta_path)
        colours = palettes[data]
        for index, scores in enumerate(result.metrics.per_class):
            colour = colours[index] if index < len(colours) else None
            rows.append((fingerprint, index, scores.name, scores.iou, scores.acc, scores.dice, colour))
    frame = pd.DataFrame(rows, columns=["fingerprint", "index", "name", "iou", "acc", "dice", "colour"])
    return frame.astype({"iou": float, "acc": float, "dice": float})


def _palette(delta: Path) -> list[str]:
    """The colours of a dataset's classes, which only the delta of a run holds; empty if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(delta, "numpy") as stored:
            palette = json.loads(stored.metadata()["header"])["palette"]
        return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in palette]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError):
        return []


def frame_of_curves(root: Path, results: Mapping[str, RunResult]) -> pd.DataFrame:
    """One row per run and point: fingerprint, step, loss, lr, miou_train, images_per_second."""
    columns = ["step", "loss", "lr", "miou_train", "images_per_second"]
    points = [
        (fingerprint, *(point.get(name) for name in columns))
        for fingerprint in results
        for point in RunFolder(root / fingerprint).curve()
        if isinstance(point, dict) and isinstance(point.get("step"), int)
    ]
    frame = pd.DataFrame(points, columns=["fingerprint", *columns])
    numbers = frame[columns].apply(pd.to_numeric, errors="coerce")
    return frame[["fingerprint"]].join(numbers)
