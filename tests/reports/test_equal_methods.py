"""The rate of wrong verdicts on real runs of one method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.runs.difference import grouped, resample
from harness.runs.store import RunStore
from reports.analysis.equal_methods import main, runs_of_other_seeds, wrong_verdicts
from tests.support.made_runs import make_run, make_spec
from tests.support.simulated import WORLDS


def test_rate_on_simulated_seeds_of_one_method_is_near_the_nominal_one() -> None:
    counts = WORLDS["both"].draw(30, np.random.default_rng(1), methods=1)[0]
    runs = [resample(grouped(one, None)) for one in counts]
    rate, half = wrong_verdicts(runs, 5, deals=300)
    assert 0 < rate < 0.1 and 0 < half < 0.1


def test_table_is_of_the_seeds_of_one_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path, make_spec("linear", seed=seed)) for seed in range(6)]
    make_run(tmp_path, make_spec("spm", seed=0))
    make_run(tmp_path, make_spec("linear", seed=7, part="dev"))
    assert len(runs_of_other_seeds(RunStore(tmp_path), runs[0].fingerprint)) == 6
    assert main([runs[3].fingerprint, "--runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 seeds, mIoU ")
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| 2", "| 3"]


def test_too_few_seeds_and_a_missing_run_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, make_spec("linear"))
    assert main([run.fingerprint, "--runs", str(tmp_path)]) == 2
    assert "has 1 finished seeds; run at least 4" in capsys.readouterr().err
    assert main(["0123456789abcdef", "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
