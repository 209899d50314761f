"""What a published table rests on, small enough to be kept with it: every run, and its pixel counts by group and class.

`reports.publish` writes both. From them `scores` computes every test score again, and `compared` every interval and p.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.runs.difference import Difference, difference, grouped, of_one_table, resample, score
from reports.read.collect import Collected

RUNS, COUNTS = "runs.csv", "counts.parquet"
SETTING = ("backbone", "weights", "dataset", "head")
"""The columns of `runs.csv` in which the runs of one table are equal. A budget can have two names there: that of the
study which first ran it, and another's."""
COLUMNS = (
    *("fingerprint", "label", "method", "hyperparameters", *SETTING, "budget", "seed"),
    *("miou", "trained_method", "trained_head", "train_seconds", "commit", "dirty", "device"),
)


def frame_of_counts(collected: Collected) -> pd.DataFrame:
    """A row per finished run, group of images and class: `hit`, `labelled` and `predicted` pixels."""
    frames = []
    for fingerprint in collected.finished["fingerprint"]:
        read = collected.counts(fingerprint)
        names = np.unique(np.array(read.groups, str)) if read.groups else np.array(read.names, str)
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
    """Every label of one setting compared with a reference at equal seeds, as in a report's table.

    Raises `UserError` if the runs are of several settings, or two runs of one label have one seed.
    """
    if mixed := [name for name in SETTING if runs[name].nunique() > 1]:
        raise UserError(f"the runs differ in {', '.join(mixed)}; compare those of one setting")
    if twice := sorted(runs.loc[runs.duplicated(["label", "seed"]), "label"].unique()):
        raise UserError(f"two runs of {', '.join(twice)} have one seed")
    seeds = {label: rows.set_index("seed")["fingerprint"] for label, rows in runs.groupby("label")}
    base = seeds.pop(reference)
    found = {}
    for label, own in seeds.items():
        shared = sorted(set(own.index) & set(base.index))
        sides = ([resample(counts[side[seed]]) for seed in shared] for side in (own, base))
        found[str(label)] = difference(*sides)
    return of_one_table(found)
