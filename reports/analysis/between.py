"""Compare rows of two published tables, such as one method under two heads: at equal seeds, over the same test images.

`python -m reports.analysis.between FOLDER:ROW FOLDER:ROW` is the difference of two rows, with its interval and p, from
the files that `reports.analysis.evidence` wrote. With four rows A B C D it is that of two gains, (A - B) - (C - D).
Nothing is corrected for other comparisons.
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
from reports.analysis.evidence import COUNTS, RUNS, counts_of


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table."""

    name: str
    images: pd.DataFrame
    """What the test images are: `group`, `class` and `labelled` pixels."""
    seeds: Mapping[int, Resampled]


def read_row(text: str) -> PublishedRow:
    """The row that `FOLDER:ROW` names. Raises `UserError` if there is none."""
    folder, _, label = text.partition(":")
    try:
        runs, counts = pd.read_csv(Path(folder) / RUNS), pd.read_parquet(Path(folder) / COUNTS)
    except (OSError, ValueError) as error:
        raise UserError(f"{text}: {folder} is not a folder with {RUNS} and {COUNTS}") from error
    own = runs[runs["label"] == label]
    if own.empty:
        names = list(runs["label"].unique())
        raise UserError(f"{text}: no row {label!r}; {did_you_mean(label, names)}")
    if own["seed"].duplicated().any():
        raise UserError(f"{text}: several runs with one seed; name a folder with one setting")
    of_runs = {run: rows for run, rows in counts.groupby("fingerprint", sort=False) if run in set(own["fingerprint"])}
    images = of_runs[own["fingerprint"].iloc[0]][["group", "class", "labelled"]].reset_index(drop=True)
    resampled = {run: resample(counts_of(rows)[str(run)]) for run, rows in of_runs.items()}
    return PublishedRow(
        text, images, {seed: resampled[run] for seed, run in zip(own["seed"], own["fingerprint"], strict=True)}
    )


def between(a: PublishedRow, b: PublishedRow, *others: PublishedRow) -> Difference:
    """A - B, or with two others C and D (A - B) - (C - D), at the seeds that all have.

    Raises `UserError` if they are of other images, or share no seed.
    """
    rows = (a, b, *others)
    for row in rows[1:]:
        if not row.images.equals(a.images):
            raise UserError(
                f"{a.name} and {row.name} are of other test images, groups or classes: they cannot be paired"
            )
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
            raise UserError(f"{len(options.rows)} rows: name two, or four")
        found = between(*map(read_row, options.rows))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    estimate, low, high = (f"{100 * value:+.2f}" for value in found.interval)
    untested = f" (no interval: {found.why_untested})" if found.why_untested else f" ({low} to {high}, p {found.p:.3g})"
    print(f"{estimate} points{untested}, {found.seeds} seeds, {found.groups} groups of images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
