"""What is kept with a published table: scores and verdicts come out of it again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.errors import UserError
from harness.runs.difference import score
from reports.analysis.evidence import COUNTS, RUNS, compared, counts_of, frame_of_counts, scores
from reports.publish import TABLES
from reports.read.collect import collect
from tests.support.made_runs import make_run, make_runs, make_spec

PUBLISHED = sorted((Path(__file__).parents[2] / "docs" / "results").glob(f"*/{RUNS}"))


def test_counts_are_those_of_the_runs(tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path, make_spec("linear", seed=seed), per_group=3)
    collected = collect(tmp_path)
    counts = counts_of(frame_of_counts(collected))
    assert len(counts) == 2
    for run in collected.finished.itertuples():
        stored = collected.counts(run.fingerprint)
        assert counts[run.fingerprint].shape == (4, *stored.counts.shape[1:])
        assert np.array_equal(counts[run.fingerprint].sum(0), stored.counts.sum(0))
        assert scores(counts)[run.fingerprint] == float(score(stored.counts.sum(0)))


def test_reference_is_compared_as_in_a_report(tmp_path: Path) -> None:
    make_runs(tmp_path, seeds=(0, 1, 2))
    collected = collect(tmp_path)
    runs = collected.finished
    found = compared(runs, counts_of(frame_of_counts(collected)), "linear")
    own = runs.pivot(index="seed", columns="label", values="miou")
    assert set(found) == set(own.columns) - {"linear"}
    for label, one in found.items():
        assert one.estimate == pytest.approx(float((own[label] - own["linear"]).mean()))
        assert one.seeds == 3 and 0 < one.p < 1


def test_runs_of_several_settings_are_not_compared(tmp_path: Path) -> None:
    make_runs(tmp_path, seeds=(0, 1))
    collected = collect(tmp_path)
    runs, counts = collected.finished, counts_of(frame_of_counts(collected))
    with pytest.raises(UserError, match=r"two runs of full, linear, .* have one seed"):
        compared(pd.concat([runs, runs]), counts, "linear")
    with pytest.raises(UserError, match="the runs differ in head; compare those of one setting"):
        compared(runs.assign(head=["fpn", *["uper"] * (len(runs) - 1)]), counts, "linear")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_scores_come_out_of_the_published_counts(path: Path) -> None:
    runs, counts = pd.read_csv(path), counts_of(pd.read_parquet(path.with_name(COUNTS)))
    assert not runs["dirty"].any() and set(runs["fingerprint"]) == set(counts)
    again = scores(counts)
    assert runs["miou"].tolist() == pytest.approx([again[fingerprint] for fingerprint in runs["fingerprint"]])
    table = path.with_name(TABLES).read_text(encoding="utf-8")
    for label, of_label in runs.groupby("label"):
        shown = f"{100 * of_label['miou'].mean():.2f} ± {100 * of_label['miou'].std():.2f}"
        assert shown in table, label
    head_only = runs.loc[runs["method"] == "linear", "label"].iloc[0]
    for label, found in compared(runs, counts, head_only).items():
        low, high = (f"{100 * value:+.2f}".replace("-", "−") for value in found.interval[1:])
        assert f"{low} to {high}" in table, label
