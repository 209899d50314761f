"""The sentences at the beginning of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from reports.analysis.answer import answers
from reports.analysis.comparison import compare
from reports.read.collect import collect
from reports.render.numbers import NumberFormat
from tests.support.made_runs import end_run, make_run, make_runs, make_spec


def answer(root: Path) -> str:
    ((name, text),) = answers(compare(collect(root)), NumberFormat().score)
    assert name == "resnet18, meadow, fpn:64, brief"
    return text


def made(
    root: Path, accuracies: Mapping[str, float], seeds: Sequence[int] = range(5), images: int = 30, per_group: int = 1
) -> Path:
    make_runs(root, list(accuracies), seeds=seeds, accuracies=accuracies, images=images, per_group=per_group)
    return root


def test_best_methods_worse_ones_and_the_cheapest_of_the_best(tmp_path: Path) -> None:
    text = answer(made(tmp_path, {"full": 0.81, "spm": 0.808, "norm": 0.65, "linear": 0.6}))
    best, other = ("full", "spm") if text.startswith("full") else ("spm", "full")
    score = text.split()[5].rstrip(".")
    assert text == (
        f"{best} has the highest mIoU, {score}. Not distinguishable from it: {other}. "
        "The cheapest of these 2 is spm, which trains 35,494 parameters besides the head. Worse: norm, linear."
    )


def test_one_method_is_best(tmp_path: Path) -> None:
    text = answer(made(tmp_path, {"spm": 0.9, "linear": 0.6}))
    assert text.startswith("spm has the highest mIoU, ") and text.endswith(". Worse: linear.")


def test_cheapest_can_be_the_head_alone(tmp_path: Path) -> None:
    text = answer(made(tmp_path, {"spm": 0.8, "linear": 0.8}))
    assert text.endswith("The cheapest of these 2 is linear, which trains the head alone.")


def test_one_seed_is_no_answer(tmp_path: Path) -> None:
    text = answer(made(tmp_path, {"spm": 0.9, "linear": 0.6}, seeds=[0]))
    assert text.endswith(", but there is no verdict: one seed.")
    assert "Worse" not in text


def test_two_seeds_and_few_groups_are_mentioned(tmp_path: Path) -> None:
    text = answer(made(tmp_path, {"spm": 0.9, "linear": 0.6}, seeds=[0, 1], per_group=10))
    assert text.endswith(
        "With two seeds, verdicts are wrong more often than the nominal 5 %. "
        "The test images are only 3 groups. Classes in fewer than 5 groups: 4; verdicts are less reliable."
    )


def test_method_without_a_second_seed_has_no_verdict(tmp_path: Path) -> None:
    made(tmp_path, {"spm": 0.9, "linear": 0.6})
    make_run(tmp_path, make_spec("norm", seed=0), 0.7, images=30)
    make_run(tmp_path, make_spec("lora", seed=9), 0.7, images=30)
    assert answer(tmp_path).endswith(
        "Worse: linear. No verdict: norm (one seed). Not comparable: lora (no seed in common)."
    )


def test_single_method_and_no_score(tmp_path: Path) -> None:
    end_run(tmp_path, make_spec("norm"), "diverged", "at step 3")
    assert answers(compare(collect(tmp_path)), str) == []
    make_run(tmp_path, make_spec("spm"))
    assert answer(tmp_path).endswith("; there is no other method.")


@pytest.mark.parametrize("damaged", ["spm", "linear"])
def test_damaged_matrices_are_not_comparable(tmp_path: Path, damaged: str) -> None:
    made(tmp_path, {"spm": 0.9, "linear": 0.6}, seeds=[0])
    (tmp_path / make_spec(damaged).fingerprint / "confusions.npz").unlink()
    assert "but there is no verdict: run " in answer(tmp_path)
