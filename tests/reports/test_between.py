"""Rows of two published tables, compared from their files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from harness.errors import UserError
from reports.analysis.between import between, main, read_row
from reports.analysis.evidence import COUNTS, RUNS, frame_of_counts
from reports.read.collect import collect
from tests.support.made_runs import make_run, make_spec

Damage = Callable[[pd.DataFrame, pd.DataFrame], tuple[pd.DataFrame, pd.DataFrame]]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Two tables of the same test images, `fpn` and `uper`, and one of others."""
    for head, gain in (("fpn:64", 0.1), ("uper:32", 0.02)):
        out, runs = tmp_path / head.partition(":")[0], tmp_path / f"runs-{head[:3]}"
        for seed in range(3):
            for method, score in (("linear", 0.6), ("spm", 0.6 + gain)):
                make_run(runs, make_spec(method, head=head, seed=seed), score + 0.01 * seed, per_group=3)
        publish(runs, out)
    make_run(tmp_path / "other", make_spec("linear"), 0.5, per_group=2)
    publish(tmp_path / "other", tmp_path / "elsewhere")
    return tmp_path


def publish(runs: Path, out: Path) -> None:
    collected = collect(runs)
    out.mkdir()
    collected.finished.to_csv(out / RUNS, index=False)
    frame_of_counts(collected).to_parquet(out / COUNTS, index=False)


def test_difference_is_that_of_the_scores(published: Path) -> None:
    scores = {
        head: pd.read_csv(published / head / RUNS).pivot(index="seed", columns="label", values="miou")
        for head in ("fpn", "uper")
    }
    rows = [read_row(f"{published}/{head}:{label}") for head in ("uper", "fpn") for label in ("spm", "linear")]
    gains = [scores[head]["spm"] - scores[head]["linear"] for head in ("uper", "fpn")]
    one = between(rows[0], rows[2])
    assert one.estimate == pytest.approx((scores["uper"]["spm"] - scores["fpn"]["spm"]).mean())
    assert one.seed_variance == pytest.approx((scores["uper"]["spm"] - scores["fpn"]["spm"]).var())
    two = between(*rows)
    assert two.estimate == pytest.approx((gains[0] - gains[1]).mean()) and two.estimate < -0.05
    assert two.seed_variance == pytest.approx((gains[0] - gains[1]).var())
    assert two.seeds == 3 and two.groups == 4 and two.interval.low < two.estimate < two.interval.high


def test_command_names_the_rows_and_prints_the_difference(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{published}/uper:linear", f"{published}/fpn:linear"]) == 0
    names, found = capsys.readouterr().out.splitlines()
    assert names == f"{published}/uper:linear - {published}/fpn:linear"
    assert " points (" in found and found.endswith("; 3 of 3 seeds, 4 groups of images")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["uper:linear"], "name two rows, or four, not 1"),
        (["uper:linear", "fpn"], "write FOLDER:ROW"),
        (["uper:linear", "fpn:sqm"], "fpn:sqm: no row 'sqm'; did you mean spm?"),
        (["uper:linear", "nowhere:linear"], "has no runs.csv and counts.parquet that fit together"),
        (["uper:linear", "elsewhere:linear"], "are of different test images, groups or classes"),
    ],
)
def test_mistakes_are_one_line(
    published: Path, capsys: pytest.CaptureFixture[str], rows: list[str], message: str
) -> None:
    assert main([f"{published}/{row}" for row in rows]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda runs, counts: (runs.replace("resnet18", "resnet50").head(1), counts), "differ in backbone"),
        (lambda runs, counts: (runs.head(1), counts.assign(labelled=counts["labelled"] + 1)), "different test images"),
        (lambda runs, counts: (runs.head(0), counts.head(0)), "no runs.csv and counts.parquet that fit together"),
        (lambda runs, counts: (runs.head(1).assign(label="NA"), counts.head(0)), "no runs.csv and counts.parquet"),
    ],
    ids=["settings", "images", "no counts", "no counts of a row called NA"],
)
def test_runs_of_a_row_must_fit_together(published: Path, damage: Damage, message: str) -> None:
    """The first run of `linear` is damaged; the others stay."""
    folder = published / "uper"
    runs, counts = pd.read_csv(folder / RUNS), pd.read_parquet(folder / COUNTS)
    first = (runs["label"] == "linear").idxmax()
    own = counts["fingerprint"] == runs.loc[first, "fingerprint"]
    changed, of_changed = damage(runs.loc[[first]], counts[own])
    label = changed["label"].iloc[0] if len(changed) else "linear"
    kept = runs.drop(index=first) if len(changed) else runs
    pd.concat([kept, changed]).to_csv(folder / RUNS, index=False)
    pd.concat([counts[~own], of_changed]).to_parquet(folder / COUNTS, index=False)
    with pytest.raises(UserError, match=message):
        between(read_row(f"{folder}:{label}"), read_row(f"{published}/fpn:linear"))
