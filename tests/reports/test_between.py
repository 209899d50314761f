"""Rows of two published tables, compared from their files alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from reports.analysis.between import between, main, read_row
from reports.analysis.evidence import COUNTS, RUNS, frame_of_counts
from reports.read.collect import collect
from tests.support.made_runs import make_run, make_spec


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


def test_command_prints_one_line(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{published}/uper:linear", f"{published}/fpn:linear"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("3 seeds, 4 groups of images\n") and " points (" in out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["uper:linear"], "1 rows: name two, or four"),
        (["uper:linear", "fpn:sqm"], "fpn:sqm: no row 'sqm'; did you mean spm?"),
        (["uper:linear", "nowhere:linear"], "is not a folder with runs.csv and counts.parquet"),
        (["uper:linear", "elsewhere:linear"], "are of other test images, groups or classes: they cannot be paired"),
    ],
)
def test_mistakes_are_one_line(
    published: Path, capsys: pytest.CaptureFixture[str], rows: list[str], message: str
) -> None:
    assert main([f"{published}/{row}" for row in rows]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
