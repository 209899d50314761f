"""A published table: its page, and what it rests on, small enough to be kept with it.

`python -m reports.publish STUDY --out FOLDER` writes three files. `results.md` has the tables of scores, comparisons,
and dev and test; `runs.csv` every reported run with its fingerprint and commit; `counts.parquet` their pixel counts by
group of images and class, from which `reports.analysis.evidence` computes test scores, intervals and p again.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cli.folders import check_writable, writing
from harness.errors import UserError
from harness.util.files import atomically
from harness.util.text import counted, list_some
from reports.analysis.comparison import compare
from reports.analysis.evidence import COLUMNS, COUNTS, RUNS, frame_of_counts
from reports.read.cited import match
from reports.read.collect import Collected, collect
from reports.render.formats import markdown
from reports.render.tables import COLUMNS as COSTS
from reports.render.tables import TableLayout
from reports.report import ABSENT, Options, as_shown, filtered, find_rows, sections_of
from studies.study import HEAD_ONLY, load_study
from studies.tune import HEAD_METHOD

TABLES = "results.md"
FILES = (TABLES, RUNS, COUNTS)
HEADINGS = ("Results", "Comparisons", "Dev and test", ABSENT)
"""Of a report's sections those that the page has."""
SHOWN = ("score", *(name for name in COSTS if name != "time"))
"""The columns of the page. Times of training compare only where nothing else ran on the machine."""


def page(collected: Collected, title: str, command: Sequence[str], references: Sequence[str]) -> str:
    """The tables of a study as Markdown, with one comparison for each label in `references`.

    `command` is what makes them, less its options for references and columns.
    """
    shown, labels = as_shown(collected, references)
    comparison = compare(shown, references=labels)
    sections = sections_of(comparison, match([], comparison, "miou"), shown, Options(layout=TableLayout(SHOWN)))
    tables = [table for heading in HEADINGS for table in sections[heading]]
    columns = shlex.join([*command, "--columns", ",".join(SHOWN)])
    named = "`, and once with `".join(shlex.join(["--reference", label]) for label in references)
    sentences = [f"Tables of `{columns}`" + (f", once with `{named}`." if named else ".")]
    sentences.append("The time of training is left out: other programs may have run on the machine.")
    if HEAD_ONLY in set(shown.runs["label"]) - set(collected.runs["label"]):
        sentences.append(f"*{HEAD_ONLY}* is `{HEAD_METHOD}`.")
    return "\n".join([f"# {title}: scores and costs\n", " ".join(sentences) + "\n", *map(markdown, tables)])


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
        check_writable("--out", options.out)
        if folders := [name for name in FILES if (options.out / name).is_dir()]:
            raise UserError(f"--out {options.out}: {list_some(folders)} is a folder; choose another folder")
        title = load_study(options.study).title or options.study.stem
        collected = filtered(collect(options.runs, options.study, options.data), options.filter)
        planned, runs = collected.reported, collected.finished
        if runs.empty:
            raise UserError(f"{options.study}: no cell is done yet")
        if unknown := list(runs.loc[runs["dirty"].ne(False), "fingerprint"]):
            number = counted(len(unknown), "run")
            raise UserError(f"{number} of code that is not known to be committed; rerun {list_some(unknown)}")
        given = options.reference or [Options.reference]
        references = list(dict.fromkeys(label for name in given for label in find_rows(planned, name)))
        filters = [part for one in options.filter for part in ("--filter", one)]
        table = page(collected, title, ["harness", "report", options.study.name, *filters], references)
        counts = frame_of_counts(collected)
        # No file is replaced before all are written.
        with writing(f"--out {options.out}"), contextlib.ExitStack() as files:
            tables, of_runs, of_counts = (files.enter_context(atomically(options.out / name)) for name in FILES)
            tables.write_text(table, encoding="utf-8")
            runs[list(COLUMNS)].to_csv(of_runs, index=False, lineterminator="\n")
            counts.to_parquet(of_counts, index=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(runs)} of {counted(len(planned), 'run')}: {', '.join(str(options.out / name) for name in FILES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
