"""Rows of runs as frames: which setting each belongs to, and how settings and methods are told apart in words."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.method import methods
from harness.runs.folder import RunFolder
from harness.runs.result import RunResult
from harness.util.files import digest
from reports.read.results import RunRow

FACETS = ["dataset", "data_digest", "backbone", "weights", "head", "budget", "budget_steps", "budget_digest", "part"]
"""What is equal for all rows of one block of a table, or one panel of a plot: a setting."""


def frame_of_runs(rows: list[RunRow], labelled: bool) -> pd.DataFrame:
    runs = pd.DataFrame([asdict(row) for row in rows], columns=[column.name for column in fields(RunRow)])
    integers = [column.name for column in fields(RunRow) if column.type == "int | None"]
    runs = runs.astype(dict.fromkeys(integers, "Int64"))
    keys = [name for name in FACETS if name != "budget"]
    runs["setting"] = [digest([str(value) for value in row])[:8] for row in runs[keys].itertuples(index=False)]
    runs["setting_name"] = _setting_names(runs)
    if not labelled:
        runs["label"] = _labels(runs)
    order = [*FACETS, "setting", "label", "hyperparameters", "method_code", "seed", "fingerprint"]
    return runs.sort_values(order, kind="stable", ignore_index=True)


def _setting_names(runs: pd.DataFrame) -> list[str]:
    """Backbone, dataset, head and budget, and of the rest as much as tells a setting from the others."""
    facets = runs.drop_duplicates("setting").set_index("setting")[FACETS]
    names = {setting: ", ".join(row[["backbone", "dataset", "head", "budget"]]) for setting, row in facets.iterrows()}
    for setting, row in facets.iterrows():
        if row["weights"] == "random":
            names[setting] += ", random weights"
        elif row["part"] != "report":
            names[setting] += f", {row['part']} part"
    for facet, told in (
        ("part", "{} part"),
        ("budget_steps", "{} steps"),
        ("weights", "weights {}"),
        ("data_digest", "data {:.8}"),
        ("budget_digest", "budget {:.8}"),
    ):
        alike = pd.Series(names).groupby(names).groups
        for settings in alike.values():
            if facets.loc[settings, facet].nunique() > 1:
                for setting in settings:
                    names[setting] += ", " + told.format(facets.loc[setting, facet])
    return [names[setting] for setting in runs["setting"]]


def _labels(runs: pd.DataFrame) -> list[str]:
    """The method's name, and where one setting holds several of its hyperparameter sets, what tells them apart."""
    labels = list(runs["method"])
    for (_, method), group in runs.groupby(["setting", "method"]):
        sets = [json.loads(text) | ({"code": code[:8]} if code else {})
                for text, code in zip(group["hyperparameters"], group["method_code"], strict=True)]  # fmt: skip
        names = sorted({name for one in sets for name in one})
        varied = [name for name in names if len({json.dumps(one.get(name)) for one in sets}) > 1]
        defaults = _defaults(method)
        told = [[(name, one[name]) for name in varied if name in one and one[name] != defaults.get(name)]
                for one in sets]  # fmt: skip
        words = [", ".join(f"{name}={_brief(value)}" for name, value in pairs) for pairs in told]
        if len(set(words)) < len({str(pairs) for pairs in told}):  # told apart by their last digits alone
            words = [", ".join(f"{name}={value}" for name, value in pairs) for pairs in told]
        for index, text in zip(group.index, words, strict=True):
            labels[index] += f"({text})" if text else ""
    return labels


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _defaults(method: str) -> dict[str, Any]:
    """Of a method that is installed; none of one that is not."""
    try:
        return {name: field.default for name, field in methods.get(method).Hyperparameters.model_fields.items()}
    except UserError:
        return {}


def frame_of_classes(root: Path, results: dict[str, RunResult]) -> pd.DataFrame:
    palettes: dict[str, list[str]] = {}
    rows = []
    for fingerprint, result in results.items():
        known = result.spec.data_digest
        if not palettes.get(known):
            palettes[known] = _palette(RunFolder(root / fingerprint).delta_path)
        colours = palettes[known]
        for index, of in enumerate(result.metrics.per_class):
            colour = colours[index] if index < len(colours) else None
            rows.append((fingerprint, index, of.name, of.iou, of.acc, of.dice, colour))
    frame = pd.DataFrame(rows, columns=["fingerprint", "index", "name", "iou", "acc", "dice", "colour"])
    return frame.astype({"iou": float, "acc": float, "dice": float})


def _palette(delta: Path) -> list[str]:
    """The classes' colours, which a run keeps in its delta alone; none where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(delta, "numpy") as stored:
            palette = json.loads(stored.metadata()["header"])["palette"]
        return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in palette]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError):
        return []


def frame_of_curves(root: Path, results: dict[str, RunResult]) -> pd.DataFrame:
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
