"""One report: tables, plots, data and the page, written to a temporary folder that then takes its place."""

from __future__ import annotations

import contextlib
import glob
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from harness.errors import UserError, did_you_mean
from harness.util.files import write_text
from harness.util.text import list_some
from reports.analysis.answer import answers
from reports.analysis.comparison import Comparison, check_metric, compare
from reports.read.cited import PublishedScore, match
from reports.read.collect import Collected, SearchRecord
from reports.render import formats, page, plots, statistics_tables, tables
from reports.render.formats import Table
from reports.render.numbers import NumberFormat
from studies.study import shown_label

MARKER = ".harness-report"
_MARK = "Written by `harness report`, which replaces these files and nothing else:"
_OF_THE_DESKTOP = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_ABANDONED = 3600.0
"""Seconds after which a half-written report is taken to be that of a killed process."""
ABSENT = "Runs without a score"
"""The page has its own list of these."""
FILTERS = ["method", "label", "backbone", "dataset", "head", "budget", "seed", "state"]


@dataclass(frozen=True)
class Options:
    """A user's choices for a report."""

    metric: str = "miou"
    reference: str = "linear"
    layout: tables.TableLayout = field(default_factory=tables.TableLayout)
    numbers: NumberFormat = field(default_factory=NumberFormat)
    title: str = "Report"
    formats: tuple[str, ...] = plots.DEFAULT
    """Of the plots' files. SVG is always among them, since the page shows it."""

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in plots.FORMATS:
                raise UserError(f"--plots {name}: no such format; {did_you_mean(name, plots.FORMATS)}")
        object.__setattr__(self, "formats", tuple(dict.fromkeys(("svg", *self.formats))))


class Written(NamedTuple):
    """The statistics and the answers of a report."""

    comparison: Comparison
    answers: list[tuple[str, str]]
    """As `reports.analysis.answer.answers`."""


def write_report(collected: Collected, published: Sequence[PublishedScore], out: Path, options: Options) -> Written:
    """Write the whole report to `out`, in place of an earlier one. The same runs give the same bytes.

    Raises `UserError` if `out` is not a report, or an option names something that no run has; an earlier report is then
    not changed.
    """
    check_metric(collected, options.metric)
    shown, references = as_shown(collected, _references(collected.reported, options.reference))
    with replacing(out) as folder:
        comparison = compare(shown, options.metric, references)
        in_miou = comparison if options.metric == "miou" else compare(shown, "miou", references)
        cited = match(published, comparison, options.metric)
        cited_miou = cited if options.metric == "miou" else match(published, in_miou, "miou")
        with plots.drawing(shown, cited_miou, in_miou, folder / "plots", options.formats) as wait:
            sections = sections_of(comparison, cited, shown, options)
            found = answers(comparison, options.numbers.score)
            _write_tables(folder / "tables", comparison, cited, shown, sections, found)
            _write_data(folder / "data.parquet", collected)
            saved = wait()
        page.write_page(
            folder / "index.html", shown, saved, cited_miou, comparison.significance, in_miou.images,
            answers=found,
            tables=[page.Section(some[0].name, heading, some) for heading, some in sections.items()
                    if some and heading != ABSENT],
            title=options.title, reference=references[0] if references else options.reference,
        )  # fmt: skip
    return Written(comparison, found)


def filtered(collected: Collected, filters: Sequence[str]) -> Collected:
    """The runs that match every `NAME=PATTERN,PATTERN`. Raises `UserError` for another form, or if no run matches."""
    mask, searches = pd.Series(True, index=collected.runs.index), collected.searches
    for text in filters:
        name, equals, patterns = text.partition("=")
        if not equals or not patterns:
            raise UserError(f"--filter {text}: expected NAME=PATTERN, such as method=spm,lora")
        if name not in FILTERS:
            raise UserError(f"--filter {text}: {name}: no such name; {did_you_mean(name, FILTERS)}")
        values = collected.runs[name].astype(str)
        mask &= values.map(partial(_matches, patterns=patterns))
        searches = [search for search in searches if _search_matches(search, name, patterns)]
        if not mask.any():
            raise UserError(f"--filter {text}: no run is left; there are: {', '.join(sorted(set(values))[:20])}")
    return replace(collected.select(mask), searches=searches)


def _matches(value: str, patterns: str) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in patterns.split(","))


def _search_matches(search: SearchRecord, name: str, patterns: str) -> bool:
    """A search has neither label nor state, and its seed is not its runs'."""
    values = {**search.definition, "budget": search.definition["budget"]["name"]}
    return name in ("label", "state", "seed") or _matches(str(values[name]), patterns)


def _references(runs: pd.DataFrame, name: str) -> list[str]:
    """The labels that every method is compared with: the requested one, and full, if there are runs of them."""
    return list(dict.fromkeys([*find_rows(runs, name), *_rows(runs, "full")]))


def find_rows(runs: pd.DataFrame, name: str) -> list[str]:
    """The labels that `--reference` names: a label, or else the labels of a method.

    Raises `UserError` for neither, but for the default, which need not be there.
    """
    if not (labels := _rows(runs, name)) and name != Options.reference:
        raise UserError(f"--reference {name}: no such method; {did_you_mean(name, set(runs['label']))}")
    return labels


def _rows(runs: pd.DataFrame, name: str) -> list[str]:
    return sorted(set(runs["label"]) & {name} or set(runs.loc[runs["method"] == name, "label"]))


def as_shown(collected: Collected, labels: Sequence[str]) -> tuple[Collected, list[str]]:
    """The runs, and some of their labels, with every label as tables show it: see `shown_label`."""
    heads = set(collected.runs["head"])
    shown = [shown_label(label, heads) for label in collected.runs["label"]]
    return replace(collected, runs=collected.runs.assign(label=shown)), [shown_label(label, heads) for label in labels]


def sections_of(
    comparison: Comparison, cited: pd.DataFrame, collected: Collected, options: Options
) -> dict[str, list[Table]]:
    """The tables by the heading of their section."""
    numbers = options.numbers
    return {
        "Results": tables.result_tables(comparison, cited, options.layout, numbers),
        "Comparisons": statistics_tables.significance_tables(comparison, numbers),
        "Classes behind the differences": statistics_tables.share_tables(comparison, numbers),
        "Dev and test": statistics_tables.dev_test_tables(comparison, numbers),
        "Over all settings": statistics_tables.overall_tables(comparison, numbers),
        "Published": tables.published_table(cited, comparison, numbers),
        ABSENT: tables.absent_table(comparison, [(one.folder, one.reason) for one in collected.skipped]),
    }


def _write_tables(
    folder: Path,
    comparison: Comparison,
    cited: pd.DataFrame,
    collected: Collected,
    sections: dict[str, list[Table]],
    found: Sequence[tuple[str, str]],
) -> None:
    for table in [table for some in sections.values() for table in some]:
        write_text(folder / f"{table.name}.md", formats.markdown(table))
        write_text(folder / f"{table.name}.tex", formats.latex(table))
    parts = [f"## Answer\n\n{formats.markdown_list(f'{name}: {text}' for name, text in found)}"] if found else []
    parts += [
        f"## {heading}\n\n" + "\n".join(map(formats.markdown, some)) for heading, some in sections.items() if some
    ]
    write_text(folder / "all.md", "\n".join(parts))
    for name, frame in {
        "results": comparison.summary,
        "runs": _without_paths(comparison.runs),
        "significance": comparison.significance,
        "class_shares": comparison.shares,
        "power": comparison.power,
        "dev_test": comparison.dev_test,
        "overall": comparison.overall,
        "agreement": comparison.agreement,
        "published": cited,
        "classes": collected.per_class,
        "skipped": pd.DataFrame(collected.skipped, columns=["folder", "reason"]),
    }.items():
        formats.write_csv(folder / f"{name}.csv", frame)


def _write_data(path: Path, collected: Collected) -> None:
    """Every run, including the trials of searches, with all its measures and the IoU of its classes as lists."""
    classes = collected.per_class.groupby("fingerprint").agg(class_names=("name", list), class_iou=("iou", list))
    runs = _without_paths(collected.runs).merge(classes, how="left", left_on="fingerprint", right_index=True)
    runs.astype({"dirty": "boolean"}).to_parquet(path, index=False)


def _without_paths(runs: pd.DataFrame) -> pd.DataFrame:
    """A path is valid on one machine only; the fingerprint finds the run on any."""
    return runs.drop(columns="path")


def _sweep(out: Path) -> None:
    """Remove what a killed `report` has left beside `out`, and put back an earlier report that it had moved."""
    with contextlib.suppress(OSError):
        for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
            old = time.time() - left.stat().st_mtime > _ABANDONED
            if (
                old
                and not left.is_symlink()
                and any((left / name / MARKER).is_file() for name in ("report", "earlier"))
            ):
                if (left / "earlier").exists() and not out.exists():
                    (left / "earlier").rename(out)
                shutil.rmtree(left, ignore_errors=True)


def _added(out: Path) -> list[str]:
    """The files of a report's folder that the report did not write; none where it does not say what it wrote."""
    if not (out / MARKER).is_file():
        return []
    written = (out / MARKER).read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    files = (path for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir())
    known = {MARKER, *written}
    names = (path.relative_to(out).as_posix() for path in files if path.name not in _OF_THE_DESKTOP)
    return [name for name in names if name not in known] if written else []


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place once it is complete.

    Raises `UserError` where `out` is a file, a folder that is neither empty nor a report, or a report with files in it
    that no report wrote.
    """
    out = out.resolve()
    foreign = out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file()))
    if foreign:
        raise UserError(f"--out {out}: exists and is not a report of the harness; choose another folder")
    if added := _added(out):
        problem = f"holds {list_some(added)}, not written by `harness report`"
        raise UserError(f"--out {out}: {problem}; move that away, or choose another folder")
    _sweep(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another folder") from error
    try:
        folder = temporary / "report"
        folder.mkdir()
        (folder / MARKER).write_text(_MARK + "\n", encoding="utf-8")  # first: `_sweep` looks for it after a kill
        yield folder
        written = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        (folder / MARKER).write_text("\n".join([_MARK, *written]) + "\n", encoding="utf-8")
        if out.exists():
            out.rename(temporary / "earlier")
        folder.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
