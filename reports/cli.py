"""The command `report`: parses, calls, prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from harness.cli.folders import check_writable
from harness.cli.options import Json, Only, read_path, with_options
from harness.engine.options import ExecutionOptions
from harness.util.progress import say
from harness.util.text import counted


@with_options(example="harness report --reference linear --filter dataset=camvid --out report")
def report(
    options: Annotated[ExecutionOptions, Only("runs", "data", "plugins")],
    study: Annotated[
        Path | None,
        typer.Argument(help="study file, or one that ships: report only its cells, including those without a run"),
    ] = None,
    out: Annotated[
        Path, typer.Option(parser=read_path, metavar="FOLDER", help="folder to write; an earlier report is replaced")
    ] = Path("report"),
    metric: Annotated[str, typer.Option(help="miou, mdice, macc, aacc or class:NAME")] = "miou",
    reference: Annotated[str, typer.Option(help="the method that every other is compared with")] = "linear",
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="of score, trained, head, share, delta, memory, time, inference, published"),
    ] = None,
    sort: Annotated[str, typer.Option(help="sort rows by score, label or a cost; -NAME reverses")] = "score",
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="NAME=PATTERN,...", help="such as method=spm,lo*; repeatable"),
    ] = None,
    unit: Annotated[Literal["percent", "share"], typer.Option(help="scores in percent or from 0 to 1")] = "percent",
    decimals: Annotated[
        int | None, typer.Option(min=0, max=9, help="decimals of scores; default: 2 in percent, else 4")
    ] = None,
    decimal_sign: Annotated[Literal[".", ","], typer.Option(help="decimal sign in tables for people")] = ".",
    plots: Annotated[
        str, typer.Option(metavar="A,B", help="formats of the plots' files besides svg: pdf, png")
    ] = "svg",
    published: Annotated[
        list[Path] | None, typer.Option(metavar="CSV", help="more published results; repeatable")
    ] = None,
    json_: Json = False,
) -> None:
    """Write tables, statistics, plots and a web page from the finished runs. Trains nothing."""
    check_writable("--out", out)
    from reports.read.cited import load_published
    from reports.read.collect import collect
    from reports.read.rows import split_warnings
    from reports.render.page.page import ANSWERS
    from reports.render.tables import NumberFormat, TableLayout
    from reports.report import Options, filtered, write_report

    layout = TableLayout(**({"columns": tuple(columns.split(","))} if columns else {}), sort=sort)
    numbers = NumberFormat(unit, decimals, decimal_sign)
    title = study.stem if study else "Report"
    chosen = Options(metric, reference, layout, numbers, title, tuple(plots.split(",")))
    cited = load_published(published or [])
    collected = filtered(collect(options.runs, study, options.data), filters or [])
    comparison, found = write_report(collected, cited, out, chosen)
    for skipped in collected.skipped:
        say(f"warning: {skipped.folder} is skipped: {skipped.reason}")
    for text in split_warnings(comparison.runs["warnings"]):
        say(f"warning: {text}")
    states = comparison.runs["state"].value_counts().sort_index()
    settings = comparison.summary["setting"].nunique()
    if json_:
        answers = [{"setting": name, "answer": text} for name, text in found]
        runs = {str(state): int(count) for state, count in states.items()}
        print(json.dumps({"report": str(out / "index.html"), "answers": answers, "runs": runs}, indent=2))
        return
    counts = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in states.items())
    for name, text in found[:ANSWERS]:
        print(f"{name}: {text}")
    if len(found) > ANSWERS:
        print(f"({len(found) - ANSWERS} more settings: see the page)")
    print(f"{counted(settings, 'setting')}, runs: {counts}")
    print(out / "index.html")
