"""Compare rows of two published tables, such as one method under two heads: at equal seeds, over the same test images.

`python -m reports.analysis.between FOLDER:ROW FOLDER:ROW` is the difference of two rows, the first minus the second,
with its interval and p, from the files that `reports.publish` wrote. With four rows A B C D it is that of two
gains, (A - B) - (C - D). There is no correction for other comparisons, and the variance over seeds is that of this one:
in a report's table it is no less than the table's median, so that intervals there can be wider.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from harness.errors import UserError, did_you_mean
from harness.runs.difference import Difference, Resampled, difference, resample
from reports.analysis.evidence import COUNTS, RUNS, SETTING, counts_of

EQUAL = [*SETTING, "budget", "hyperparameters"]
"""The columns in which the runs of one row are equal."""
IMAGES = ["group", "class", "labelled"]


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table: its runs with one label, which differ in their seed alone."""

    name: str
    images: pd.DataFrame
    """What the test images are: `IMAGES`, a row for each group and class."""
    seeds: Mapping[int, Resampled]


def read_row(text: str) -> PublishedRow:
    """The row that `FOLDER:ROW` names. Raises `UserError` if there is none, or if its files do not fit together."""
    folder, colon, label = text.partition(":")
    if not (folder and colon and label):
        raise UserError(f"{text!r}: write FOLDER:ROW, such as docs/results/landcover:spm")
    try:
        runs = pd.read_csv(Path(folder) / RUNS, dtype={"label": str, "fingerprint": str}, keep_default_na=False)
        counts = pd.read_parquet(Path(folder) / COUNTS)
        own = runs.loc[runs["label"] == label, ["fingerprint", "seed", *EQUAL]]
        of_runs = {str(run): rows for run, rows in counts.groupby("fingerprint", sort=False)}
        images = [of_runs[run][IMAGES].reset_index(drop=True) for run in own["fingerprint"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{text}: {folder} has no {RUNS} and {COUNTS} that fit together: {error!r}") from error
    if own.empty:
        raise UserError(f"{text}: no row {label!r}; {did_you_mean(label, runs['label'].unique())}")
    mixed = [name for name in EQUAL if own[name].nunique() > 1]
    if mixed:
        raise UserError(f"{text}: its runs differ in {', '.join(mixed)}; publish one setting")
    if own["seed"].duplicated().any():
        raise UserError(f"{text}: two of its runs have one seed")
    if not all(one.equals(images[0]) for one in images):
        raise UserError(f"{text}: its runs are of different test images, groups or classes")
    pairs = zip(own["seed"], own["fingerprint"], strict=True)
    return PublishedRow(text, images[0], {int(seed): resample(counts_of(of_runs[run])[run]) for seed, run in pairs})


def between(a: PublishedRow, b: PublishedRow, *others: PublishedRow) -> Difference:
    """A - B, or with two others C and D (A - B) - (C - D), at the seeds that all have.

    Raises `UserError` if they are of other images, or share no seed.
    """
    rows = (a, b, *others)
    for row in rows[1:]:
        if not row.images.equals(a.images):
            raise UserError(f"{a.name} and {row.name} are of different test images, groups or classes")
    seeds = sorted(set.intersection(*(set(row.seeds) for row in rows)))
    if not seeds:
        raise UserError(f"no seed is in all of {', '.join(row.name for row in rows)}")
    sides = [[row.seeds[seed] for seed in seeds] for row in rows]
    if others:
        sides = [[_minus(*pair) for pair in zip(*two, strict=True)] for two in (sides[:2], sides[2:])]
    return difference(*sides)


def _minus(a: Resampled, b: Resampled) -> Resampled:
    return Resampled(a.observed - b.observed, np.subtract(a.scores, b.scores), a.groups)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reports.analysis.between", description=__doc__)
    parser.add_argument("rows", nargs="+", metavar="FOLDER:ROW", help="two rows, or four")
    options = parser.parse_args(arguments)
    try:
        if len(options.rows) not in (2, 4):
            raise UserError(f"name two rows, or four, not {len(options.rows)}")
        rows = [read_row(text) for text in options.rows]
        found = between(*rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    gains = [f"({one.name} - {other.name})" for one, other in zip(rows[::2], rows[1::2], strict=True)]
    print(" - ".join(gains) if len(gains) > 1 else gains[0][1:-1])
    estimate, low, high = (f"{100 * value:+.2f}" for value in found.interval)
    tested = f"no interval: {found.why_untested}" if found.why_untested else f"{low} to {high}, p {found.p:.3g}"
    most = max(len(row.seeds) for row in rows)
    print(f"{estimate} points ({tested}); {found.seeds} of {most} seeds, {found.groups} groups of images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
