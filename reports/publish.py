"""A published table: its page, and what it rests on, small enough to be kept with it.

`python -m reports.publish STUDY --out FOLDER` writes three files. `results.md` has the tables of scores, comparisons,
and dev and test; `runs.csv` every reported run with its fingerprint and commit; `counts.parquet` their pixel counts by
group of images and class, from which `reports.analysis.evidence` computes every score and verdict again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cli.folders import check_writable, writing
from harness.errors import UserError
from harness.util.files import write_text
from reports.analysis.comparison import compare
from reports.analysis.evidence import COLUMNS, COUNTS, RUNS, frame_of_counts
from reports.read.cited import match
from reports.read.collect import Collected, collect
from reports.render.formats import markdown
from reports.render.numbers import NumberFormat
from reports.render.statistics_tables import dev_test_tables, significance_tables
from reports.render.tables import COLUMNS as COSTS
from reports.render.tables import TableLayout, result_tables
from reports.report import as_shown, filtered, find_rows
from studies.study import load_study

TABLES = "results.md"
SHOWN = ("score", *(name for name in COSTS if name != "time"))
"""The columns of the page. Times of training compare only where nothing else ran on the machine."""


def page(collected: Collected, title: str, command: str, references: Sequence[str]) -> str:
    """The tables of a study's finished cells as Markdown, with one comparison for each reference; `command` makes them.

    Raises `UserError` if a reference names no row.
    """
    labels = dict.fromkeys(label for name in references for label in find_rows(collected.reported, name))
    collected, shown = as_shown(collected, list(labels))
    numbers, comparison = NumberFormat(), compare(collected, references=shown)
    tables = [
        *result_tables(comparison, match([], comparison, "miou"), TableLayout(SHOWN), numbers),
        *significance_tables(comparison, numbers),
        *dev_test_tables(comparison, numbers),
    ]
    intro = (
        f"Tables of `{command} --columns {','.join(SHOWN)}`, with a comparison for each `--reference`. The time of "
        "training is left out: other programs may have run on the machine."
    )
    return "\n".join([f"# {title}: scores and costs\n", intro + "\n", *map(markdown, tables)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reports.publish", description=__doc__)
    parser.add_argument("study", type=Path, help="study file, or one that ships")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the datasets (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; files of these names are replaced")
    parser.add_argument(
        "--reference", action="append", metavar="ROW", help="to compare with; repeatable (default linear)"
    )
    parser.add_argument(
        "--filter", action="append", default=[], metavar="NAME=PATTERN,...", help="as of `harness report`"
    )
    options = parser.parse_args(arguments)
    try:
        title = load_study(options.study).title
        collected = filtered(collect(options.runs, options.study, options.data), options.filter)
        runs = collected.finished
        if runs.empty:
            raise UserError(f"{options.study}: no cell is done yet")
        if runs["dirty"].any():
            raise UserError(f"{int(runs['dirty'].sum())} runs are of code that was not committed; rerun them")
        command = " ".join(["harness report", options.study.stem, *(f"--filter {one}" for one in options.filter)])
        text = page(collected, title, command, options.reference or ["linear"])
        check_writable("--out", options.out)
        with writing(str(options.out)):
            options.out.mkdir(parents=True, exist_ok=True)
            runs[list(COLUMNS)].to_csv(options.out / RUNS, index=False)
            frame_of_counts(collected).to_parquet(options.out / COUNTS, index=False)
            write_text(options.out / TABLES, text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(runs)} runs: {options.out}/{{{RUNS},{COUNTS},{TABLES}}}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
