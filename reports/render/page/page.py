"""The page's sections: verdicts, tables, plots and runs without a score. The script's data are in `data.py`."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment
from markupsafe import Markup

from harness.runs.state import RunState
from harness.util.files import write_text
from reports.analysis.paired import BETTER, NO_VERDICT, NOT_COMPARABLE, SAME, WORSE
from reports.read.collect import Collected
from reports.read.rows import MISSING, split_warnings, state_label
from reports.render.formats import Table, TableCell
from reports.render.page.data import page_data, positions
from reports.render.page.samples import collect_pictures
from reports.render.page.svg import inlined, marker
from reports.render.plots.saving import SavedPlot
from reports.render.style import styles_of, theme

PAGE_BYTES = 9_500_000
"""The largest size of the page. Plots and samples beyond it are left out, and their files named."""

PLOT_BYTES = 3_500_000
"""The largest share of it for plots."""

ANSWERS = 8
"""How many settings' answers are shown before the others are folded away."""

TRADEOFF = "tradeoff"
"""The section that the page draws itself; its plots are only linked."""

PLOT_SECTIONS = {
    "statistics": "Statistics",
    "curves": "Learning curves",
    "classes": "Classes",
    "searches": "Searches",
}
"""In the page's order."""

SCRIPTS = ("common.js", "tradeoff.js", "runs.js", "samples.js")
"""One script in this order."""

STATES: tuple[str, ...] = (
    *(state for state in RunState if state.failed),
    RunState.DAMAGED,
    RunState.INTERRUPTED,
    RunState.RUNNING,
    MISSING,
    RunState.UNSUPPORTED,
)
"""Those of runs without a result, in the page's order."""


@dataclass(frozen=True)
class Section:
    """A section of the page: tables or plots."""

    id: str
    heading: str
    tables: Sequence[Table] = ()
    plots: list[PagePlot] = field(default_factory=list)


@dataclass(frozen=True)
class PagePlot:
    """A plot on the page: inlined where there is room for it, with links to its files."""

    title: str
    caption: str
    svg: Markup | None
    links: list[tuple[str, str]]
    """Format and relative address."""


def write_page(
    path: Path,
    collected: Collected,
    plots: Sequence[SavedPlot],
    published: pd.DataFrame,
    significance: pd.DataFrame,
    images: pd.DataFrame,
    tables: Sequence[Section] = (),
    answers: Sequence[tuple[str, str]] = (),
    title: str = "Report",
    reference: str = "linear",
) -> Path:
    """Write the page to `path`; the plots' files are linked relative to it."""
    runs = collected.reported
    styles = styles_of(runs, published)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_template("page.html"))
    script = '"use strict";\n(() => {\n' + "\n".join(map(_template, SCRIPTS)) + "})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    absent = _absent(collected)
    fields = {
        "title": title,
        "policy": f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:",
        "light": theme(dark=False),
        "dark": theme(dark=True),
        "css": Markup(_template("page.css")),
        "script": Markup(script),
        "scope": _scope(runs),
        "answers": answers,
        "warnings": split_warnings(runs.warnings),
        "answers_shown": ANSWERS,
        "verdicts": _verdicts(significance, runs, reference),
        "reference": reference,
        "table_sections": tables,
        "absent": Section("absent", "Runs without a score", absent) if absent else None,
        "tradeoff_files": [
            PagePlot(plot.title, plot.caption, None, _links(plot, path.parent))
            for plot in plots
            if plot.section == TRADEOFF
        ],
        "plot_sections": _plot_sections(plots, path.parent),
        "has_samples": not collected.finished.empty,
        "mark": lambda label: marker(styles[label]) if label in styles else "",
    }
    fields["sections"] = _sections(fields)
    settings = positions(runs)
    data = page_data(collected, published, images, styles, reference, settings)
    room = PAGE_BYTES - len(template.render(**fields, data="")) - len(json.dumps(data))
    gallery = collect_pictures(collected, room)
    data |= {"pictures": gallery.pictures}
    data |= {"samples": [{**sample, "setting": settings[sample["setting"]]} for sample in gallery.samples]}
    for run in data["runs"]:
        run["predictions"] = gallery.predictions.get(run["id"])
    write_text(path, template.render(**fields, data=_inert(data)))
    return path


def _template(name: str) -> str:
    return resources.files("reports.render.page").joinpath("templates", name).read_text(encoding="utf-8")


def _inert(data: Any) -> Markup:
    """JSON that cannot end the script element that it is in."""
    return Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _sections(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Id and heading of every section, for the page's navigation."""
    return [
        *([("verdicts", "Verdicts")] if fields["verdicts"] else []),
        ("tradeoff", "Trade-off"),
        *((section.id, section.heading) for section in fields["table_sections"]),
        ("runs", "Runs"),
        *([("samples", "Samples")] if fields["has_samples"] else []),
        *((section.id, section.heading) for section in fields["plot_sections"]),
        *([("absent", fields["absent"].heading)] if fields["absent"] else []),
    ]


def _scope(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """The content of the report in numbers."""
    counted = [
        (runs[column].nunique(), noun)
        for column, noun in (("label", "method"), ("backbone", "backbone"), ("dataset", "dataset"), ("seed", "seed"))
    ]
    nouns = [(f"{count:,}", noun + ("" if count == 1 else "s")) for count, noun in counted]
    states = runs.state.value_counts()
    return [
        *nouns,
        *((f"{states[state]:,}", state_label(state)) for state in (RunState.DONE, *STATES) if state in states),
    ]


def _verdicts(significance: pd.DataFrame, runs: pd.DataFrame, reference: str) -> list[dict[str, Any]]:
    """Per setting, the labels with each verdict: lists of equal weight."""
    names = dict(zip(runs.setting, runs.setting_name, strict=True))
    rows = significance[significance.reference == reference]
    kinds = [BETTER, SAME, WORSE, *(kind for kind in (NO_VERDICT, NOT_COMPARABLE) if (rows.verdict == kind).any())]
    return [
        {
            "setting": names[setting],
            "groups": [
                (
                    kind.capitalize(),
                    kind.split()[0],
                    list(here.sort_values("difference", ascending=False).label[here.verdict == kind]),
                )
                for kind in kinds
            ],
        }
        for setting, here in sorted(rows.groupby("setting"), key=lambda group: names[group[0]])
    ]


def _plot_sections(plots: Sequence[SavedPlot], folder: Path) -> list[Section]:
    sections = {id_: Section(f"plots-{id_}", heading) for id_, heading in PLOT_SECTIONS.items()}
    room = PLOT_BYTES
    for plot in plots:
        if plot.section == TRADEOFF:
            continue
        svg = inlined(plot)
        room -= len(svg)
        shown = PagePlot(plot.title, plot.caption, Markup(svg) if room > 0 else None, _links(plot, folder))
        sections[plot.section].plots.append(shown)
    return [section for section in sections.values() if section.plots]


def _links(plot: SavedPlot, folder: Path) -> list[tuple[str, str]]:
    return [(file.suffix[1:].upper(), file.relative_to(folder).as_posix()) for file in plot.files]


def _absent(collected: Collected) -> list[Table]:
    """Runs without a score, one table per state; cells that only differ in their seed share a row."""
    runs = collected.reported.assign(reason=collected.reported.reason.fillna(""))
    tables = []
    for state in STATES:
        cells = runs[runs.state == state].groupby(["label", "setting_name", "reason"], sort=True)
        rows = [
            [TableCell(text, "text") for text in (label, setting, ", ".join(map(str, sorted(here.seed))), reason)]
            for (label, setting, reason), here in cells
        ]
        name = state_label(state).capitalize()
        tables.append(Table(str(state), name, ["method", "setting", "seeds", "reason"], rows))
    skipped = [[TableCell(one.folder, "text"), TableCell(one.reason, "text")] for one in collected.skipped]
    tables.append(Table("skipped", "Folders that could not be read", ["folder", "reason"], skipped))
    return [table for table in tables if table.rows]
