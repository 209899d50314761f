"""One folder a report: page, plots, tables, data. Built beside its place and put there whole."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pandas as pd

from harness.errors import UserError, did_you_mean
from harness.util.files import write_text
from reports.analysis.comparison import Comparison, check_metric, compare
from reports.read.cited import Published, match
from reports.read.collect import Collected, SearchRecord
from reports.render import formats, page, plots, tables
from reports.render.formats import Table

MARKER = ".harness-report"
ABSENT = "Without a figure"
"""The page has a list of its own of these."""
FILTERS = ["method", "label", "backbone", "dataset", "head", "budget", "seed", "state"]


@dataclass(frozen=True)
class Options:
    """What a user can choose of a report."""

    metric: str = "miou"
    reference: str = "linear"
    layout: tables.TableLayout = field(default_factory=tables.TableLayout)
    numbers: tables.NumberFormat = field(default_factory=tables.NumberFormat)
    title: str = "Report"


def write_report(collected: Collected, published: Sequence[Published], out: Path, options: Options) -> Comparison:
    """Write the whole report to `out`, in place of an earlier one. The same runs give the same bytes.

    Raises `UserError` where `out` holds something else, or an option names what the runs have not; a report that was
    there is then left as it is.
    """
    check_metric(collected, options.metric)
    references = _references(collected.reported, options.reference)
    with replacing(out) as folder:
        comparison = compare(collected, options.metric, references)
        in_miou = comparison if options.metric == "miou" else compare(collected, "miou", references)
        cited = match(published, comparison, options.metric)
        cited_miou = cited if options.metric == "miou" else match(published, in_miou, "miou")
        built = _tables(comparison, cited, collected, options)
        _write_tables(folder / "tables", comparison, cited, collected, built)
        _write_data(folder / "data.parquet", collected)
        drawings = plots.draw_all(collected, cited_miou, in_miou.significance, folder / "plots")
        told = [page.Section(some[0].name, heading, some) for heading, some in built.items() if some]
        page.write_page(
            folder / "index.html", collected, drawings, cited_miou, comparison.significance,
            tables=[section for section in told if section.heading != ABSENT],
            title=options.title, reference=references[0] if references else options.reference,
        )  # fmt: skip
    return comparison


def filtered(collected: Collected, filters: Sequence[str]) -> Collected:
    """The runs that match every `NAME=PATTERN,PATTERN`. Raises `UserError` for another form, or where none does."""
    chosen, searches = pd.Series(True, index=collected.runs.index), collected.searches
    for text in filters:
        name, equals, patterns = text.partition("=")
        if not equals or not patterns:
            raise UserError(f"--filter {text}: expected NAME=PATTERN, such as method=spm,lora")
        if name not in FILTERS:
            raise UserError(f"--filter {text}: {name}: no such name; {did_you_mean(name, FILTERS)}")
        values = collected.runs[name].astype(str)
        chosen &= values.map(partial(_matches, patterns=patterns))
        searches = [one for one in searches if _serves(one, name, patterns)]
        if not chosen.any():
            raise UserError(f"--filter {text}: no run is left; there are: {', '.join(sorted(set(values))[:20])}")
    return replace(collected.select(chosen), searches=searches)


def _matches(value: str, patterns: str) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in patterns.split(","))


def _serves(search: SearchRecord, name: str, patterns: str) -> bool:
    """A search has neither label nor state, and its seed is not its runs'."""
    told = {**search.definition, "budget": search.definition["budget"]["name"]}
    return name in ("label", "state", "seed") or _matches(str(told[name]), patterns)


def _references(runs: pd.DataFrame, wanted: str) -> list[str]:
    """The labels that every method is held against: the one asked for and full, as far as the runs have them.

    A name is a label's, or else a method's, which may have several.
    """
    found: dict[str, None] = {}
    for name in (wanted, "full"):
        labels = set(runs["label"]) & {name} or set(runs.loc[runs["method"] == name, "label"])
        if not labels and name == wanted != Options.reference:
            raise UserError(f"--reference {name}: no such method; {did_you_mean(name, set(runs['label']))}")
        found |= dict.fromkeys(sorted(labels))
    return list(found)


def _tables(
    comparison: Comparison, cited: pd.DataFrame, collected: Collected, options: Options
) -> dict[str, list[Table]]:
    numbers = options.numbers
    return {
        "Results": tables.result_tables(comparison, cited, options.layout, numbers),
        "Against the references": tables.significance_tables(comparison, numbers),
        "Over all settings": tables.overall_tables(comparison, numbers),
        "Published": tables.published_table(cited, comparison.metric, numbers),
        ABSENT: tables.absent_table(comparison, [(one.folder, one.reason) for one in collected.skipped]),
    }


def _write_tables(
    folder: Path, comparison: Comparison, cited: pd.DataFrame, collected: Collected, built: dict[str, list[Table]]
) -> None:
    for table in [table for some in built.values() for table in some]:
        write_text(folder / f"{table.name}.md", formats.markdown(table))
        write_text(folder / f"{table.name}.tex", formats.latex(table))
    together = "\n".join(
        f"## {heading}\n\n" + "\n".join(map(formats.markdown, some)) for heading, some in built.items() if some
    )
    write_text(folder / "all.md", together)
    for name, frame in {
        "results": comparison.summary,
        "runs": _without_places(comparison.runs),
        "significance": comparison.significance,
        "improvement": comparison.improvement,
        "averages": comparison.averages,
        "stability": comparison.stability,
        "published": cited,
        "classes": collected.per_class,
        "skipped": pd.DataFrame(collected.skipped, columns=["folder", "reason"]),
    }.items():
        formats.write_csv(folder / f"{name}.csv", frame)


def _write_data(path: Path, collected: Collected) -> None:
    """Every run, the trials of searches too, with all its figures and the IoU of its classes as lists."""
    classes = collected.per_class.groupby("fingerprint").agg(class_names=("name", list), class_iou=("iou", list))
    runs = _without_places(collected.runs).merge(classes, how="left", left_on="fingerprint", right_index=True)
    runs.astype({"dirty": "boolean"}).to_parquet(path, index=False)


def _without_places(runs: pd.DataFrame) -> pd.DataFrame:
    """A path is of one machine; the fingerprint finds the run on any."""
    return runs.drop(columns="path")


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place once it is whole.

    Raises `UserError` where `out` is a file, or a folder with something in it that is no report.
    """
    out = out.resolve()
    foreign = out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file()))
    if foreign:
        raise UserError(f"--out {out}: is there and no report of the harness; choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another folder") from error
    try:
        folder = beside / "report"
        folder.mkdir()
        (folder / MARKER).write_text("Written by `harness report`, which replaces this folder as a whole.\n")
        yield folder
        if out.exists():
            out.rename(beside / "earlier")
        folder.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
