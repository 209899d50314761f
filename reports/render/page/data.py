"""The data of the page's script, as JSON: every run with its measures, curve, classes, spec and provenance."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.runs.difference import mean_interval
from harness.runs.result import COSTS, MEASURES, METRICS, ONLY_FOUND, Measure, Provenance, Unit, about_only_found
from harness.runs.state import RunState
from reports.analysis.comparison import about_unlabelled
from reports.read.collect import Collected
from reports.read.frames import rows_of
from reports.read.rows import split_warnings, state_label
from reports.render.page.samples import extremes
from reports.render.plots.context import BAR_SEEDS, BARS
from reports.render.plots.tradeoff import axis_scale
from reports.render.style import LINES, SeriesStyle, outline, variable

_UNIT: dict[Unit, str] = {"share": ", %", "bytes": ", MiB", "seconds": ", s", "rate": ", images/s", "ratio": ", ×"}
"""The end of a measure's heading."""


@dataclass(frozen=True)
class Column:
    """A column of the table of runs."""

    key: str
    """In `Collected.runs`."""
    name: str
    kind: str
    """text, state, or the unit of a measure; count for a seed."""

    @classmethod
    def of(cls, measure: Measure) -> Column:
        return cls(measure.key, measure.title + _UNIT.get(measure.unit, ""), measure.unit)


MEASURED = [Column.of(measure) for measure in MEASURES.values()]
COLUMNS = [
    Column("label", "method", "text"),
    *(Column(name, name, "text") for name in ("backbone", "dataset", "head", "budget")),
    Column("seed", "seed", "count"),
    *MEASURED,
    Column("state", "state", "state"),
]
FILTERS = [column for column in COLUMNS if column.key in ("label", "backbone", "dataset", "state")]


def positions(runs: pd.DataFrame) -> dict[str, int]:
    """Each setting's position in the page's lists, which are sorted by its name."""
    names = sorted(set(zip(runs.setting_name, runs.setting, strict=True)))
    return {setting: position for position, (_, setting) in enumerate(names)}


def page_data(
    collected: Collected,
    published: pd.DataFrame,
    images: pd.DataFrame,
    styles: Mapping[str, SeriesStyle],
    reference: str,
    settings: Mapping[str, int],
) -> dict[str, Any]:
    """All but the samples; `settings` as `positions` has them."""
    runs = collected.reported
    names = dict(zip(runs.setting, runs.setting_name, strict=True))
    curves = dict(list(collected.curves.groupby("fingerprint")))
    classes = dict(list(collected.per_class.groupby("fingerprint")))
    class_lists: list[list[tuple[str, str | None]]] = []
    package_lists: list[list[tuple[str, str]]] = []
    entries = []
    for row in runs.to_dict("records"):
        run = {column.key: _plain(row[column.key]) for column in COLUMNS}
        run |= {"id": _plain(row["fingerprint"]), "setting": settings[row["setting"]], "reason": _plain(row["reason"])}
        run |= {"spec": _spec(row), "command": _command(collected.root, row)}
        if row["state"] == RunState.DONE:
            run["remarks"] = remarks(row["unlabelled"], row["only_found"], row["warnings"])
            run |= _provenance(collected.provenance[row["fingerprint"]], package_lists)
            run["curve"] = _curve(curves.get(row["fingerprint"]))
            run |= _classes(classes.get(row["fingerprint"]), class_lists)
        entries.append(run)
    differences: dict[int, dict[str, Any]] = {}
    for setting, label, found in extremes(images, reference):
        differences.setdefault(settings[setting], {})[label] = found
    return {
        "settings": [names[setting] for setting in settings],
        "methods": {
            label: {"colour": variable(style.colour), "outline": outline(style.marker)}
            for label, style in sorted(styles.items())
        },
        "states": {state: state_label(state) for state in sorted(set(runs.state))},
        "columns": [asdict(column) for column in COLUMNS],
        "tiles": [asdict(column) for column in MEASURED],
        "filters": [asdict(column) for column in FILTERS],
        "costs": [
            {
                "key": cost.key,
                "name": cost.title,
                "axis": cost.axis,
                "kind": cost.unit,
                "unit": axis_scale(cost),
                "log": cost.head_counted is not None,
            }
            for cost in COSTS.values()
            if cost.plotted
        ],
        "metrics": [{"key": metric.key, "name": metric.title} for metric in METRICS.values()],
        "runs": entries,
        "published": _published(published, settings),
        "classes": class_lists,
        "packages": package_lists,
        "extremes": differences,
        "reference": reference,
        "lines": {label: " ".join(str(round(1.4 * dash)) for dash in dashes) for label, dashes in LINES.items()},
        "bars": _bars(max(runs.groupby(["setting", "label"]).size(), default=0)),
        "barsCaption": BARS,
        "withoutSamples": f"Samples that did not fit into the page are in {collected.root}/<run>/samples.",
    }


def remarks(unlabelled: str, only_found: str, warnings: str) -> list[str]:
    """Remarks without which the score of a run would mislead, from the columns of `Collected.runs`."""
    return [
        *([about_unlabelled(unlabelled)] if unlabelled else []),
        *([f"{about_only_found([only_found])}: {ONLY_FOUND}"] if only_found else []),
        *(f"Warning: {text}" for text in split_warnings([warnings])),
    ]


def _bars(most: int) -> list[float | None]:
    """By the number of seeds: half the 95 % interval of a mean, in standard deviations of the sample."""
    unit = [mean_interval([-1.0, *[0.0] * (seeds - 2), 1.0]) for seeds in range(BAR_SEEDS, most + 1)]
    deviations = [math.sqrt(2 / (seeds - 1)) for seeds in range(BAR_SEEDS, most + 1)]
    return [None] * BAR_SEEDS + [_plain(one.high / by) for one, by in zip(unit, deviations, strict=True)]


def _spec(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The parts of the spec that a row of the report holds."""
    hyperparameters = json.loads(row["hyperparameters"])
    names = ("backbone", "weights", "dataset", "data_digest", "head", "budget", "budget_steps", "seed", "part")
    return [
        ("method", row["method"]),
        *((name, str(value)) for name, value in sorted(hyperparameters.items())),
        *((name.replace("_", " "), str(_plain(row[name]))) for name in names),
    ]


def _command(root: Path, row: Mapping[str, Any]) -> str | None:
    """The command that repeats the run; None for a cell that has no run yet."""
    path = _plain(row["path"])
    if path is None:
        return None
    return f"harness run --from {shlex.quote(str(Path(path) / 'spec.yaml'))} --runs {shlex.quote(str(root))}"


def _provenance(provenance: Provenance, package_lists: list[list[tuple[str, str]]]) -> dict[str, Any]:
    """A run's provenance as pairs; equal lists of packages, which most runs share, are in the page once."""
    fields = provenance.model_dump()
    listed = fields.pop("packages", None)
    packages = [(name, str(version)) for name, version in sorted(listed.items())] if isinstance(listed, dict) else []
    if packages not in package_lists:
        package_lists.append(packages)
    pairs: list[tuple[str, str]] = []
    for name, value in fields.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        pairs += [(f"{name} {key}".strip().replace("_", " "), _text(entry)) for key, entry in entries]
    return {"provenance": pairs, "packages": package_lists.index(packages)}


def _text(entry: Any) -> str:
    return ", ".join(str(_plain(one)) for one in (entry if isinstance(entry, list) else [entry]))


def _curve(points: pd.DataFrame | None) -> dict[str, list[Any]] | None:
    if points is None:
        return None
    return {
        name: [_plain(value) for value in points[column]]
        for name, column in (("step", "step"), ("loss", "loss"), ("miou", "miou_train"))
    }


def _classes(rows: pd.DataFrame | None, lists: list[list[tuple[str, str | None]]]) -> dict[str, Any]:
    """A run's IoU of each class, and the index of its list of names and colours."""
    if rows is None:
        return {}
    named = [(name, _plain(colour)) for name, colour in zip(rows.name, rows.colour, strict=True)]
    if named not in lists:
        lists.append(named)
    return {"classes": lists.index(named), "iou": [_plain(value) for value in rows.iou]}


def _published(published: pd.DataFrame, settings: Mapping[str, int]) -> list[dict[str, Any]]:
    """Published scores, each on the axis that counts parameters as its source does."""
    axes = {cost.head_counted: cost.key for cost in COSTS.values() if cost.head_counted is not None}
    rows = published[published.setting.isin(list(settings))].dropna(subset=["trained", "value"])
    return [
        {
            "setting": settings[row.setting],
            "label": row.label,
            "method": row.method,
            "cost": axes[bool(row.head_counted)],
            "metric": row.metric,
            "x": _plain(row.trained),
            "y": _plain(row.value),
            "source": row.source,
            "sure": row.sure,
        }
        for row in rows_of(rows)
    ]


def _plain(value: Any) -> Any:
    """A value for JSON: null if missing, floats with six significant digits."""
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(f"{value:.6g}") if isinstance(value, float) else str(value)
