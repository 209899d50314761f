"""Reading run folders, incomplete ones too."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from harness.errors import UserError
from harness.spec import Budget
from reports.read.collect import Collected, collect
from tests.support.made_runs import (
    BACKBONE_PARAMETERS,
    HEAD_PARAMETERS,
    PALETTE,
    end_run,
    make_run,
    make_search,
    make_spec,
)


def labels(collected: Collected) -> list[str]:
    return sorted(set(collected.reported["label"]))


def test_finished_run_is_a_row_with_scores_and_costs(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_spec("spm", seed=3))
    result = run.read_result()
    (row,) = collect(tmp_path).runs.to_dict("records")
    assert (row["state"], row["fingerprint"], row["seed"]) == ("done", run.fingerprint, 3)
    assert row["miou"] == result.metrics.miou
    assert (row["trained_method"], row["trained_head"]) == (35_494, HEAD_PARAMETERS)
    assert row["backbone_parameters"] == BACKBONE_PARAMETERS
    assert row["setting_name"] == "resnet18, meadow, fpn:64, brief"


def test_classes_curves_and_counts_are_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_spec())
    collected = collect(tmp_path)
    assert list(collected.per_class["name"]) == ["water", "forest", "crops", "snow"]
    assert collected.per_class["colour"][0] == "#{:02x}{:02x}{:02x}".format(*PALETTE[0])
    assert list(collected.curves["step"]) == [10, 20, 30, 40]
    read = collected.counts(run.fingerprint)
    assert (len(read.names), read.counts.shape) == (12, (12, 3, 4))
    assert read.groups == [f"scene {number}" for number in range(12)]


@pytest.mark.parametrize("state", ["failed", "diverged", "out_of_memory", "unsupported", "interrupted", "timed_out"])
def test_run_without_result_is_a_row_with_its_reason(tmp_path: Path, state: str) -> None:
    end_run(tmp_path, make_spec("vpt_deep"), state, "because")
    (row,) = collect(tmp_path).runs.to_dict("records")
    assert (row["state"], row["reason"]) == (state, "because")
    assert pd.isna(row["miou"]) and pd.isna(row["trained"])


def test_run_of_a_dead_process_is_interrupted(tmp_path: Path) -> None:
    end_run(tmp_path, make_spec(), "running", "")
    assert list(collect(tmp_path).runs["state"]) == ["interrupted"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "result.json: "),
        ("[]", "result.json: "),
        ('{"status": "done"}', "result.json: "),
        (None, "result.json: missing"),
    ],
)
def test_unreadable_result_is_damaged(tmp_path: Path, text: str | None, reason: str) -> None:
    run = make_run(tmp_path, make_spec())
    run.result_path.unlink() if text is None else run.result_path.write_text(text)
    (row,) = collect(tmp_path).runs.to_dict("records")
    assert row["state"] == "damaged"
    assert row["reason"].startswith(reason)
    assert pd.isna(row["miou"])


@pytest.mark.parametrize("field", ["miou", "train_seconds", "seed"])
def test_possible_value_that_was_edited_is_damaged(tmp_path: Path, field: str) -> None:
    run = make_run(tmp_path, make_spec())
    result = json.loads(run.result_path.read_text())
    where = {"miou": result["metrics"], "seed": result["spec"]}.get(field, result)
    where[field] += 1 if field == "seed" else 0.001
    run.result_path.write_text(json.dumps(result))
    (row,) = collect(tmp_path).runs.to_dict("records")
    assert (row["state"], row["reason"]) == ("damaged", "result.json: was changed after the run ended")


@pytest.mark.parametrize("field", ["miou", "trainable"])
def test_impossible_value_is_damaged(tmp_path: Path, field: str) -> None:
    run = make_run(tmp_path, make_spec())
    text = run.result_path.read_text()
    result = json.loads(text)
    (result["metrics"] if field == "miou" else result["parameters"])[field] = -1
    run.result_path.write_text(json.dumps(result))
    assert list(collect(tmp_path).runs["state"]) == ["damaged"]


def test_result_of_another_run_is_damaged(tmp_path: Path) -> None:
    one, other = make_run(tmp_path, make_spec(seed=0)), make_run(tmp_path, make_spec(seed=1))
    other.result_path.write_bytes(one.result_path.read_bytes())
    runs = collect(tmp_path).runs.set_index("fingerprint")
    assert runs.loc[other.fingerprint, "state"] == "damaged"
    assert one.fingerprint in runs.loc[other.fingerprint, "reason"]


def test_folder_without_spec_is_skipped(tmp_path: Path) -> None:
    make_run(tmp_path, make_spec())
    (tmp_path / "0123456789abcdef").mkdir()
    collected = collect(tmp_path)
    assert len(collected.runs) == 1
    assert [one.folder for one in collected.skipped] == ["0123456789abcdef"]
    assert "spec.yaml is missing or damaged" in collected.skipped[0].reason


def test_incomplete_curve_and_missing_delta_are_tolerated(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_spec())
    run.delta_path.unlink()
    with run.curve_path.open("a") as handle:
        handle.write('{"step": 50, "lo')
    collected = collect(tmp_path)
    assert list(collected.runs["state"]) == ["done"]
    assert len(collected.curves) == 4
    assert collected.per_class["colour"].isna().all()


def test_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        collect(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        collect(tmp_path / "absent")


def test_labels_name_the_hyperparameters_that_differ(tmp_path: Path) -> None:
    defaults = {"head_lr": 3e-3, "weight_decay": 0.01}
    for changed in ({}, {"head_lr": 0.0041234567}, {"weight_decay": 0.0}):
        make_run(tmp_path, make_spec("linear", hyperparameters=defaults | changed))
    make_run(tmp_path, make_spec("lora", hyperparameters=defaults | {"rank": 32}))
    assert labels(collect(tmp_path)) == ["linear", "linear(head_lr=0.004123)", "linear(weight_decay=0)", "lora"]


def test_labels_of_nearly_equal_hyperparameters_differ(tmp_path: Path) -> None:
    for lr in (0.00312345, 0.00312346):
        make_run(tmp_path, make_spec("linear", hyperparameters={"head_lr": lr}))
    assert labels(collect(tmp_path)) == ["linear(head_lr=0.00312345)", "linear(head_lr=0.00312346)"]


def test_labels_name_the_version_of_a_plugin(tmp_path: Path) -> None:
    for code in ("a" * 64, "b" * 64):
        make_run(tmp_path, make_spec("mine", method_code=code))
    assert labels(collect(tmp_path)) == ["mine(code=aaaaaaaa)", "mine(code=bbbbbbbb)"]


def test_setting_names_say_what_differs(tmp_path: Path) -> None:
    budget = Budget(name="brief", steps=80, batch_size=4, crop=(32, 32))
    make_run(tmp_path, make_spec())
    make_run(tmp_path, make_spec(budget=budget))
    make_run(tmp_path, make_spec(weights="random"))
    runs = collect(tmp_path).runs
    assert sorted(runs["setting_name"]) == [
        "resnet18, meadow, fpn:64, brief, 40 steps",
        "resnet18, meadow, fpn:64, brief, 80 steps",
        "resnet18, meadow, fpn:64, brief, random weights",
    ]
    assert runs["setting"].nunique() == 3


def test_budgets_that_differ_in_name_are_one_setting(tmp_path: Path) -> None:
    make_run(tmp_path, make_spec(seed=0))
    make_run(tmp_path, make_spec(seed=1, budget=make_spec().budget.model_copy(update={"name": "same"})))
    assert collect(tmp_path).runs["setting"].nunique() == 1


def test_trials_are_not_reported(tmp_path: Path) -> None:
    make_run(tmp_path, make_spec())
    make_search(tmp_path, trials=4)
    collected = collect(tmp_path)
    assert labels(collected) == ["linear"]
    (search,) = collected.searches
    assert (search.definition["method"], search.importances) == ("spm", {"lr": 0.8, "hidden": 0.2})
    assert list(search.trials["state"]) == ["complete", "complete", "complete", "failed"]


def test_search_without_trials_is_ignored(tmp_path: Path) -> None:
    make_run(tmp_path, make_spec())
    (make_search(tmp_path) / "trials.json").unlink()
    collected = collect(tmp_path)
    assert collected.searches == [] and collected.skipped == []


@pytest.mark.parametrize("name", ["search.json", "trials.json", "importances.json"])
def test_damaged_search_is_skipped(tmp_path: Path, name: str) -> None:
    make_run(tmp_path, make_spec())
    (make_search(tmp_path) / name).write_text("{")
    collected = collect(tmp_path)
    assert collected.searches == []
    assert [one.folder for one in collected.skipped] == ["searches/spm-resnet18-meadow-0a1b2c3d"]
