"""The report as one page: a single file that opens from disk, reaches for nothing, and keeps every text inert.

The scatter and the charts are drawn by the page's own script as SVG: a plotting bundle weighs as much as the rest of
the page, and its points are no links that a keyboard reaches.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from jinja2 import Environment
from markupsafe import Markup

from harness.runs.folder import RunFolder
from harness.util.files import write_text
from reports.read.collect import Collected
from reports.render.formats import Table, TableCell
from reports.render.plots import COSTS, Drawing, finished, looks_of
from reports.render.samples import collect_pictures, extremes
from reports.render.style import SeriesStyle, outline, theme, themed, variable

PAGE_BYTES = 9_500_000
"""What the page may weigh. Drawings and pictures that have no room in it are named with their place."""

DRAWING_BYTES = 3_500_000
"""What the drawings may take of it."""

FIGURES = {"miou": "mIoU", "mdice": "mDice", "macc": "mAcc", "aacc": "aAcc"}


@dataclass(frozen=True)
class Column:
    """A figure of a run: its column in `Collected.runs`, its heading, and how the page writes it."""

    key: str
    name: str
    kind: str
    """text, state, share, count, bytes (written in MiB), seconds, rate or ratio."""


MEASURED = (
    *(Column(key, f"{name}, %", "share") for key, name in FIGURES.items()),
    Column("trained_method", "trained, method", "count"),
    Column("trained_head", "trained, head", "count"),
    Column("delta_bytes", "delta, MiB", "bytes"),
    Column("peak_memory_bytes", "peak memory, MiB", "bytes"),
    Column("train_seconds", "training, s", "seconds"),
    Column("images_per_second", "images / s", "rate"),
    Column("inference_ratio", "inference ratio", "ratio"),
)
COLUMNS = (
    Column("label", "method", "text"),
    Column("backbone", "backbone", "text"),
    Column("dataset", "dataset", "text"),
    Column("head", "head", "text"),
    Column("budget", "budget", "text"),
    Column("seed", "seed", "count"),
    *MEASURED,
    Column("state", "state", "state"),
)
FILTERS = [column for column in COLUMNS if column.key in ("label", "backbone", "dataset", "state")]

HEADINGS = {
    "statistics": "Statistics",
    "curves": "Learning curves",
    "classes": "Classes",
    "searches": "Searches",
    "tradeoff": "Trade-off drawings",
}
"""The sections of drawings, in the page's order."""

STATES = {
    "failed": "Failed",
    "diverged": "Diverged",
    "out_of_memory": "Out of memory",
    "damaged": "Damaged",
    "interrupted": "Interrupted",
    "running": "Running",
    "missing": "Missing",
    "unsupported": "Unsupported",
}


@dataclass(frozen=True)
class Section:
    """A section of tables."""

    id: str
    heading: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class PageFigure:
    """A drawing on the page: inlined where there is room, and the files it is also in."""

    title: str
    caption: str
    svg: Markup | None
    links: list[tuple[str, str]]


def write_page(
    path: Path,
    collected: Collected,
    drawings: Sequence[Drawing],
    published: pd.DataFrame,
    significance: pd.DataFrame,
    tables: Sequence[Section] = (),
    title: str = "Report",
    reference: str = "linear",
) -> Path:
    """Write the page to `path`; the drawings' files are linked relative to it."""
    runs = collected.reported
    looked = looks_of(runs, published)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_template("page.html"))
    script = _template("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    drawn, absent = _drawn(drawings, path.parent), _absent(collected)
    fields = {
        "title": title,
        "policy": f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:",
        "light": theme(dark=False),
        "dark": theme(dark=True),
        "css": Markup(_template("page.css")),
        "script": Markup(script),
        "scope": _scope(runs),
        "verdicts": _verdicts(significance, runs, reference),
        "reference": reference,
        "tabled": tables,
        "absent": Section("absent", "Without a figure", absent) if absent else None,
        "drawn": drawn,
        "pictured": not finished(runs).empty,
        "mark": lambda label: _mark(looked[label]) if label in looked else "",
    }
    fields["sections"] = _sections(fields)
    places = _places(runs)
    data = _data(collected, published, looked, reference, places)
    room = PAGE_BYTES - len(template.render(**fields, data="")) - len(json.dumps(data))
    album = collect_pictures(collected, finished(runs), room)
    data |= {"pictures": album.pictures}
    data |= {"samples": [sample | {"setting": places[sample["setting"]]} for sample in album.samples]}
    for run in data["runs"]:
        run["predictions"] = album.predictions.get(run["id"])
    write_text(path, template.render(**fields, data=_inert(data)))
    return path


def _template(name: str) -> str:
    return resources.files("reports").joinpath("render", "templates", name).read_text(encoding="utf-8")


def _inert(data: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    return Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _sections(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        *([("verdicts", "Verdicts")] if fields["verdicts"] else []),
        ("tradeoff", "Trade-off"),
        *((section.id, section.heading) for section in fields["tabled"]),
        ("runs", "Runs"),
        *([("pictures", "Pictures")] if fields["pictured"] else []),
        *((section["id"], section["heading"]) for section in fields["drawn"]),
        *([("absent", "Without a figure")] if fields["absent"] else []),
    ]


def _scope(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """What is in the report, in numbers."""
    counted = [
        (runs[column].nunique(), noun)
        for column, noun in (("label", "method"), ("backbone", "backbone"), ("dataset", "dataset"), ("seed", "seed"))
    ]
    states = runs.state.value_counts()
    counted_states = [(states[state], state.replace("_", " ")) for state in ("done", *STATES) if state in states]
    plural = [(f"{count:,}", noun + ("" if count == 1 else "s")) for count, noun in counted]
    return [*plural, *((f"{count:,}", noun) for count, noun in counted_states)]


def _verdicts(significance: pd.DataFrame, runs: pd.DataFrame, reference: str) -> list[dict[str, Any]]:
    """Per setting, which methods are better, not significantly different, and worse: three lists of equal weight."""
    names = dict(zip(runs.setting, runs.setting_name, strict=True))
    rows = significance[significance.reference == reference]
    kinds = (
        ("better", "Better"),
        ("no significant difference", "No significant difference"),
        ("worse", "Worse"),
        *([("not comparable", "Not comparable")] if (rows.verdict == "not comparable").any() else []),
    )
    return [
        {
            "setting": names[setting],
            "groups": [
                (
                    heading,
                    kind.split()[0],
                    list(here.sort_values("difference", ascending=False).label[here.verdict == kind]),
                )
                for kind, heading in kinds
            ],
        }
        for setting, here in sorted(rows.groupby("setting"), key=lambda group: names[group[0]])
    ]


def _drawn(drawings: Iterable[Drawing], folder: Path) -> list[dict[str, Any]]:
    sections: dict[str, list[PageFigure]] = {}
    room = DRAWING_BYTES
    for drawing in drawings:
        svg = inlined(drawing)
        room -= len(svg)
        links = [(path.suffix[1:].upper(), path.relative_to(folder).as_posix()) for path in drawing.files]
        shown = PageFigure(drawing.title, drawing.caption, Markup(svg) if room > 0 else None, links)
        sections.setdefault(drawing.section, []).append(shown)
    return [
        {"id": f"drawn-{section}", "heading": heading, "drawings": sections[section]}
        for section, heading in HEADINGS.items()
        if section in sections
    ]


def inlined(drawing: Drawing) -> str:
    """A drawing's SVG as an element of the page: in the page's colours, with ids of its own, without metadata."""
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(drawing.svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in (f"{svg}metadata", f"{svg}style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(svg)
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            element.set(name.rpartition("}")[2], _adapted(name.rpartition("}")[2], value, drawing.name))
    points = float(root.attrib["width"].removesuffix("pt"))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("style", f"min-width: {0.95 * points:.0f}px; max-width: {1.6 * points:.0f}px")
    root.set("role", "img")
    root.set("aria-label", f"{drawing.title}. {drawing.caption}")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _adapted(name: str, value: str, own: str) -> str:
    """An attribute's value, its ids prefixed with the drawing's name, its colours the page's variables."""
    if name == "id":
        return f"{own}-{value}"
    if name == "href":
        return value.replace("#", f"#{own}-", 1)
    if name == "clip-path":
        return value.replace("url(#", f"url(#{own}-")
    return themed(value) if name == "style" else value


def _absent(collected: Collected) -> list[Table]:
    """What has no figure, by why; cells that differ in their seed alone are one line."""
    runs = collected.reported.assign(reason=collected.reported.reason.fillna(""))
    groups = []
    for state, heading in STATES.items():
        cells = runs[runs.state == state].groupby(["label", "setting_name", "reason"], sort=True)
        rows = [
            [TableCell(text, "text") for text in (label, setting, ", ".join(map(str, sorted(here.seed))), reason)]
            for (label, setting, reason), here in cells
        ]
        groups.append(Table(state, heading, ["method", "setting", "seeds", "reason"], rows))
    skipped = [[TableCell(one.folder, "text"), TableCell(one.reason, "text")] for one in collected.skipped]
    groups.append(Table("skipped", "Folders that could not be read", ["folder", "reason"], skipped))
    return [group for group in groups if group.rows]


def _mark(look: SeriesStyle) -> Markup:
    return Markup(
        '<svg class="mark" viewBox="-1.2 -1.2 2.4 2.4" aria-hidden="true"><path d="{}" fill="var({})"/></svg>'
    ).format(outline(look.marker), variable(look.colour))


def _places(runs: pd.DataFrame) -> dict[str, int]:
    """Each setting's place in the page's lists, which are sorted by its name."""
    names = sorted(set(zip(runs.setting_name, runs.setting, strict=True)))
    return {setting: place for place, (_, setting) in enumerate(names)}


def _data(
    collected: Collected,
    published: pd.DataFrame,
    looked: Mapping[str, SeriesStyle],
    reference: str,
    places: Mapping[str, int],
) -> dict[str, Any]:
    """What the page's script works on."""
    runs = collected.reported
    names = dict(zip(runs.setting, runs.setting_name, strict=True))
    curves = dict(list(collected.curves.groupby("fingerprint")))
    classes = dict(list(collected.per_class.groupby("fingerprint")))
    class_lists: list[list[tuple[str, str | None]]] = []
    package_lists: list[list[tuple[str, str]]] = []
    told = []
    for row in runs.to_dict("records"):
        run = {column.key: _plain(row[column.key]) for column in COLUMNS}
        run |= {"id": _plain(row["fingerprint"]), "setting": places[row["setting"]], "reason": _plain(row["reason"])}
        run |= {"trained": _plain(row["trained"]), "spec": _spec(row), "command": _command(collected.root, row)}
        if row["state"] == "done":
            run |= _from_result(collected.root / row["fingerprint"], package_lists)
            run["curve"] = _curve(curves.get(row["fingerprint"]))
            run |= _classes(classes.get(row["fingerprint"]), class_lists)
        told.append(run)
    by_setting: dict[int, dict[str, Any]] = {}
    for setting, label, found in extremes(collected, finished(runs), reference):
        by_setting.setdefault(places[setting], {})[label] = found
    return {
        "settings": [names[setting] for setting in places],
        "methods": {
            label: {"colour": variable(look.colour), "outline": outline(look.marker)}
            for label, look in sorted(looked.items())
        },
        "columns": [asdict(column) for column in COLUMNS],
        "tiles": [asdict(column) for column in MEASURED],
        "filters": [asdict(column) for column in FILTERS],
        "costs": [
            {
                "key": cost.column,
                "name": cost.title,
                "axis": cost.axis,
                "kind": cost.kind,
                "unit": cost.unit,
                "log": cost.head_counted is not None,
            }
            for cost in COSTS
        ],
        "figures": [{"key": key, "name": name} for key, name in FIGURES.items()],
        "runs": told,
        "published": _cited(published, places),
        "classes": class_lists,
        "packages": package_lists,
        "extremes": by_setting,
        "reference": reference,
        "withoutPictures": f"Pictures that are not in the page are in {collected.root}/<run>/samples.",
    }


def _spec(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, as far as a row of the report says it."""
    settings = json.loads(row["hyperparameters"])
    names = ("backbone", "weights", "dataset", "data_digest", "head", "budget", "budget_steps", "seed", "part")
    return [
        ("method", row["method"]),
        *((name, str(value)) for name, value in sorted(settings.items())),
        *((name.replace("_", " "), str(_plain(row[name]))) for name in names),
    ]


def _command(root: Path, row: Mapping[str, Any]) -> str | None:
    """What repeats the run; None for a cell that has no run yet."""
    path = _plain(row["path"])
    if path is None:
        return None
    return f"harness run --from {shlex.quote(str(Path(path) / 'spec.yaml'))} --runs {shlex.quote(str(root))}"


def _from_result(folder: Path, package_lists: list[list[tuple[str, str]]]) -> dict[str, Any]:
    """The run's budget and provenance; lists of packages, which most runs share, are kept once."""
    result = RunFolder(folder).result()
    provenance = result.provenance.model_dump() if result else {}
    listed = provenance.pop("packages", None)
    packages = [(name, str(version)) for name, version in sorted(listed.items())] if isinstance(listed, dict) else []
    if packages not in package_lists:
        package_lists.append(packages)
    flat: list[tuple[str, str]] = []
    for name, value in provenance.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        flat += [(f"{name} {key}".strip().replace("_", " "), str(_plain(entry))) for key, entry in entries]
    return {"provenance": flat, "packages": package_lists.index(packages)}


def _curve(points: pd.DataFrame | None) -> dict[str, list] | None:
    if points is None:
        return None
    return {
        name: [_plain(value) for value in points[column]]
        for name, column in (("step", "step"), ("loss", "loss"), ("miou", "miou_train"))
    }


def _classes(rows: pd.DataFrame | None, lists: list[list[tuple[str, str | None]]]) -> dict[str, Any]:
    """A run's IoU of each class, and which list of names and colours it goes by."""
    if rows is None:
        return {}
    named = [(name, _plain(colour)) for name, colour in zip(rows.name, rows.colour, strict=True)]
    if named not in lists:
        lists.append(named)
    return {"classes": lists.index(named), "iou": [_plain(value) for value in rows.iou]}


def _cited(published: pd.DataFrame, places: Mapping[str, int]) -> list[dict[str, Any]]:
    """Published figures, each on the axis that counts parameters as its source does."""
    axes = {cost.head_counted: cost.column for cost in COSTS if cost.head_counted is not None}
    rows = published[published.setting.isin(list(places))].dropna(subset=["trained", "value"])
    return [
        {
            "setting": places[row.setting],
            "label": row.label,
            "look": row.method,
            "cost": axes[bool(row.head_counted)],
            "metric": row.metric,
            "x": _plain(row.trained),
            "y": _plain(row.value),
            "source": row.source,
            "sure": row.sure,
        }
        for row in rows.itertuples()
    ]


def _plain(value: Any) -> Any:
    """As JSON has it: what is missing is null, a float has the digits that a reader can use."""
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(f"{value:.6g}") if isinstance(value, float) else str(value)
