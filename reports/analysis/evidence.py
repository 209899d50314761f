"""What a published table rests on, small enough to be kept with it: every run, and its pixel counts by group and class.

`python -m reports.analysis.evidence STUDY --runs runs --out FOLDER` writes `runs.csv` and `counts.parquet` of a study's
finished cells. From the counts alone `scores` computes every score again, and `compared` every verdict.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from harness.cli.folders import check_writable, writing
from harness.errors import UserError
from harness.runs.difference import Difference, difference, grouped, of_one_table, resample, score
from reports.read.collect import Collected, collect

RUNS, COUNTS = "runs.csv", "counts.parquet"
COLUMNS = (
    *("fingerprint", "label", "method", "hyperparameters", "backbone", "weights", "dataset", "head", "budget", "seed"),
    *("miou", "trained_method", "trained_head", "train_seconds", "commit", "dirty", "device"),
)


def frame_of_counts(collected: Collected) -> pd.DataFrame:
    """A row per finished run, group of images and class: `hit`, `labelled` and `predicted` pixels."""
    frames = []
    for fingerprint in collected.finished["fingerprint"]:
        read = collected.counts(fingerprint)
        names = np.unique(np.array(read.groups or read.names, str))
        counts = grouped(read.counts, read.groups)
        groups, classes = np.indices((counts.shape[0], counts.shape[2])).reshape(2, -1)
        hit, labelled, predicted = counts.transpose(1, 0, 2).reshape(3, -1)
        labels = np.array(collected.class_names[fingerprint], str)[classes]
        columns = {"group": names[groups], "class": labels, "hit": hit, "labelled": labelled, "predicted": predicted}
        frames.append(pd.DataFrame({"fingerprint": fingerprint, **columns}))
    return pd.concat(frames, ignore_index=True)


def counts_of(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """The inverse of `frame_of_counts`: by fingerprint the counts of groups, int64 [G, 3, K]."""
    found = {}
    for fingerprint, rows in frame.groupby("fingerprint", sort=False):
        groups = rows["group"].nunique()
        values = rows[["hit", "labelled", "predicted"]].to_numpy()
        found[str(fingerprint)] = values.reshape(groups, -1, 3).transpose(0, 2, 1)
    return found


def scores(counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mIoU of every run, from its counts [G, 3, K]."""
    return {fingerprint: float(score(of_groups.sum(0))) for fingerprint, of_groups in counts.items()}


def compared(runs: pd.DataFrame, counts: Mapping[str, np.ndarray], reference: str) -> dict[str, Difference]:
    """Every label of one setting compared with a reference at equal seeds, as in a report's table."""
    seeds = {label: rows.set_index("seed")["fingerprint"] for label, rows in runs.groupby("label")}
    base = seeds.pop(reference)
    found = {}
    for label, own in seeds.items():
        shared = sorted(set(own.index) & set(base.index))
        sides = ([resample(counts[side[seed]]) for seed in shared] for side in (own, base))
        found[str(label)] = difference(*sides)
    return of_one_table(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reports.analysis.evidence", description=__doc__)
    parser.add_argument("study", type=Path, help="study file, or one that ships")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the datasets (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    try:
        collected = collect(options.runs, options.study, options.data)
        runs = collected.finished
        if runs.empty:
            raise UserError(f"{options.study}: no cell is done yet")
        if runs["dirty"].any():
            raise UserError(f"{int(runs['dirty'].sum())} runs are of code that was not committed; rerun them")
        check_writable("--out", options.out)
        with writing(str(options.out)):
            options.out.mkdir(parents=True, exist_ok=True)
            runs[list(COLUMNS)].to_csv(options.out / RUNS, index=False)
            frame_of_counts(collected).to_parquet(options.out / COUNTS, index=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(runs)} runs: {options.out / RUNS}, {options.out / COUNTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
