"""Specs and budgets: validation, budget files, the learning-rate schedule. Fingerprints: `test_fingerprint.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from harness.errors import UserError
from harness.spec import Budget, Spec, budget, budgets

FIELDS: dict[str, Any] = {
    "method": "spm",
    "hyperparameters": {"lr": 0.001, "guidance": True, "gaps": "all"},
    "backbone": "resnet18",
    "weights": "timm:resnet18.a1_in1k",
    "dataset": "shapes",
    "data_digest": "0" * 64,
    "head": "fpn",
    "budget": budgets()["demo"],
    "seed": 0,
}


def spec(**changes: Any) -> Spec:
    return Spec(**{**FIELDS, **changes})


def test_spec_and_fingerprint_survive_yaml() -> None:
    assert Spec.from_yaml(spec().to_yaml()) == spec()
    assert Spec.from_yaml(spec().to_yaml()).fingerprint == spec().fingerprint
    assert len(spec().fingerprint) == 16


@pytest.mark.parametrize("change", [{"seed": -1}, {"seed": 2**31}, {"part": "test"}, {"device": "cpu"}], ids=str)
def test_invalid_spec_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(**change)


def test_spec_is_immutable() -> None:
    with pytest.raises(ValidationError):
        spec().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "- a", "[", "method: spm"])
def test_text_that_is_not_a_spec_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        Spec.from_yaml(text)


def test_learning_rate_warms_up_linearly_and_decays_to_zero() -> None:
    chosen = Budget(name="x", steps=10, batch_size=1, crop=(8, 8), warmup=3, power=1.0)
    # Over four steps to the full rate, times a line from 1 at step 0 to 0 at step 10.
    expected = [0.25 * 1.0, 0.5 * 0.9, 0.75 * 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert [chosen.learning_rate_factor(step) for step in range(10)] == pytest.approx(expected)


def test_shipped_budgets_match_common_schedules() -> None:
    assert list(budgets()) == ["demo", "small", "20k", "40k", "80k", "160k"]
    assert [budgets()[name].steps for name in ("20k", "40k", "80k", "160k")] == [20_000, 40_000, 80_000, 160_000]


def test_budget_file_overrides_its_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: small\nsteps: 7\nwarmup: 1\n")
    expected = budgets()["small"].model_copy(update={"name": "mine", "steps": 7, "warmup": 1})
    assert budget(str(file)) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected the fields of a budget"),
        ("- steps", "expected the fields of a budget"),
        ("[1", "not YAML"),
        ("steps: 3", "batch_size: is missing"),
        ("base: smal", "base: smal: no such budget; did you mean small?"),
        ("base: [small]", "base: ['small']: no such budget"),
        ("base: small\nstep: 3", "step: no such field; did you mean steps or stride?"),
        ("base: small\nsteps: 0", "steps: 0: input should be greater than or equal to 1"),
        ("base: small\nsteps: many", "steps: many: expected an integer"),
        ("base: small\ncrop: 32", "crop: 32: use [height, width] in pixels"),
        ("base: small\ncrop: [0, 32]", "crop: [0, 32]: invalid size"),
        ("base: small\ncrop: [1000000, 32]", "crop: [1000000, 32]: invalid size; use [height, width] in pixels, 1 to"),
        ("base: small\nresize: [1.0e-9, 1]", "resize: [1e-09, 1]: invalid range; use scales of 0.01 to 20"),
        ("base: small\nresize: [1, 1.0e+9]", "resize: [1, 1000000000.0]: invalid range; use scales of 0.01 to 20"),
        (
            "base: small\nsteps: 10000000000000",
            "steps: 10000000000000: input should be less than or equal to 1000000000",
        ),
        ("base: small\nsteps: true", "steps: True: expected a number"),
        ("base: small\nsteps: 2024-01-31", "steps: 2024-01-31: expected an integer"),
        ("base: small\npower: 1.0e+300", "power: 1e+300: input should be less than or equal to 100"),
        ("base: small\npower: .nan", "line 2: power: .nan is not a finite number"),
        ("base: small\n? " + "k" * 5000 + "\n: 1", f"{'k' * 120}: no such field"),
        ("base: small\nresize: [2, 0.5]", "resize: [2, 0.5]: invalid range"),
        ("base: small\nwarmup: 1200", "warmup: 1200: leaves none of the 1200 steps"),
        ("base: small\nbatch_size: 3\naccumulate: 2", "accumulate: 2: does not divide the batch_size, 3"),
        ("base: small\nprecision: fp8", "precision: fp8: input should be 'fp32', 'tf32', 'bf16' or 'fp16'"),
        ("base: small\nevaluation: slide", "stride: is missing; slide evaluation needs"),
        ("base: small\nevaluation: slide\nstride: [193, 1]", "stride: [193, 1]: leaves gaps between windows"),
        ("base: small\nstride: [8, 8]", "stride: [8, 8]: is only for"),
    ],
)
def test_invalid_budget_file_is_a_one_line_error_with_the_field(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        budget(str(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_budget_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"budget dem: no such budget; did you mean demo\?"):
        budget("dem")
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        budget(str(tmp_path / "none.yaml"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not YAML"):
        budget(str(binary))
