"""The number of seeds that a study needs, by its finished runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from harness.runs.store import RunStore
from reports.analysis.comparison import compare
from reports.read.collect import collect
from studies.plan import Plan, make_plan
from studies.power import seeds_needed
from studies.study import load_study
from tests.support.made_runs import make_run


@pytest.fixture
def plan(tmp_path: Path, colours: Path) -> Plan:
    """Three methods with four seeds, none run yet."""
    cells = {
        "methods": ["linear", "spm", "lora"],
        "backbones": [{"backbone": "resnet10t", "weights": "random"}],
        "datasets": [str(colours)],
        "heads": ["fpn:16"],
        "budget": "demo",
        "seeds": [0, 1, 2, 3],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(cells))
    return replan(tmp_path)


def replan(folder: Path) -> Plan:
    return make_plan(load_study(str(folder / "study.yaml")), RunStore(folder / "runs"), folder)


def run(folder: Path, plan: Plan, label: str, seeds: int) -> None:
    for cell in [cell for cell in plan.cells if cell.label == label][:seeds]:
        assert cell.spec is not None
        make_run(folder / "runs", cell.spec, images=200)


def needed(folder: Path) -> list[str]:
    return [str(one) for one in seeds_needed(replan(folder), RunStore(folder / "runs"))]


def test_number_of_seeds_is_that_of_the_report(tmp_path: Path, plan: Plan) -> None:
    for label in ("linear", "spm", "lora"):
        run(tmp_path, plan, label, 4)
    (found,) = seeds_needed(replan(tmp_path), RunStore(tmp_path / "runs"))
    (reported,) = compare(collect(tmp_path / "runs"), references=["linear"]).power.to_dict("records")
    assert found.seeds == 4
    here, there = (int(text.removesuffix(" seeds")) for text in (found.for_a_point, reported["for_a_point"]))
    assert here == pytest.approx(there, abs=1)  # other draws of images
    assert str(found).startswith("resnet10t, colours, fpn:16: to find a true difference with probability 0.8, by the")


def test_one_seed_says_nothing(tmp_path: Path, plan: Plan) -> None:
    run(tmp_path, plan, "linear", 4)
    run(tmp_path, plan, "spm", 1)
    assert needed(tmp_path) == []


def test_damaged_matrices_are_left_out(tmp_path: Path, plan: Plan) -> None:
    for label in ("linear", "spm"):
        run(tmp_path, plan, label, 3)
    broken = next(cell for cell in plan.cells if cell.label == "spm")
    assert broken.fingerprint is not None
    (tmp_path / "runs" / broken.fingerprint / "confusions.npz").write_bytes(b"")
    assert "the variances of the 2 seeds that are done" in needed(tmp_path)[0]
