"""The command `report`: parses, calls, prints."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.main import Data, Plugin, Runs


class Unit(enum.StrEnum):
    percent = "percent"
    share = "share"


class DecimalSign(enum.StrEnum):
    point = "."
    comma = ","


def report(
    study: Annotated[Path | None, typer.Argument(help="study file: its cells alone, also those without a run")] = None,
    runs: Runs = Path("runs"),
    data: Data = Path("data"),
    out: Annotated[Path, typer.Option(help="folder of the report; an earlier report there is replaced")] = Path(
        "report"
    ),
    metric: Annotated[str, typer.Option(help="miou, mdice, macc, aacc or class:NAME")] = "miou",
    reference: Annotated[str, typer.Option(help="the method that every other is held against")] = "linear",
    columns: Annotated[
        str | None, typer.Option(help="A,B of figure, trained, head, share, delta, memory, time, inference, published")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="rows by figure, label or a column of costs; -NAME turns it round")
    ] = "figure",
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="NAME=PATTERN,...", help="such as method=spm,lo*; repeatable"),
    ] = None,
    unit: Annotated[Unit, typer.Option(help="figures in percent or as a share of 1")] = Unit.percent,
    decimals: Annotated[int | None, typer.Option(min=0, max=9, help="of figures; default 2 in percent, else 4")] = None,
    decimal_sign: Annotated[DecimalSign, typer.Option(help="in tables for people")] = DecimalSign.point,
    published: Annotated[
        list[Path] | None, typer.Option(metavar="CSV", help="further published figures; repeatable")
    ] = None,
    plugin: Plugin = None,
) -> None:
    """Tables, statistics, plots and one page to open, from the runs that are there. Trains nothing."""
    from reports.read.cited import load_published
    from reports.read.collect import collect
    from reports.render.tables import NumberFormat, TableLayout
    from reports.report import Options, filtered, write_report

    options = Options(
        metric=metric,
        reference=reference,
        layout=TableLayout(**({"columns": tuple(columns.split(","))} if columns else {}), sort=sort),
        numbers=NumberFormat(unit.value, decimals, decimal_sign.value),
        title=study.stem if study else "Report",
    )
    cited = load_published(published or [])
    collected = filtered(collect(runs, study, data), filters or [])
    comparison = write_report(collected, cited, out, options)
    for skipped in collected.skipped:
        print(f"warning: {skipped.folder} is left out: {skipped.reason}", file=sys.stderr)
    states = comparison.runs["state"].value_counts().sort_index()
    settings = comparison.summary["setting"].nunique()
    print(f"{settings} setting{'s' * (settings != 1)}, runs: "
          + ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in states.items()))  # fmt: skip
    print(out / "index.html")
