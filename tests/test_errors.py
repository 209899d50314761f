"""The error for a wrong value names its place: the flag, or the file and the key."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.errors import UserError, located
from harness.runs.store import RunStore
from studies.plan import make_plan
from studies.study import load_study
from tests.support.in_process import refusal, runs_in

NO_METHOD = "spn: no such method; did you mean spm?"
NO_HEAD = "upper: no such head; did you mean uper?"
NO_BACKBONE = "resnet110: unknown; did you mean resnet1"
NO_DATASET = "landcove: no such dataset; did you mean landcover?"
NO_BUDGET = "dem: no such budget; did you mean demo?"


def test_error_is_one_line_with_field_value_problem_and_hint() -> None:
    error = UserError("no such method", field="method", value="spn", hint="did you mean spm?")
    assert str(error) == f"method {NO_METHOD}"
    assert error.for_command_line() == f"--method {NO_METHOD}"
    assert str(error.at("s.yaml", key="methods")) == f"s.yaml: methods: {NO_METHOD}"
    assert error.for_command_line() == str(error)
    assert str(UserError("plain text")) == UserError("plain text").for_command_line() == "plain text"


def test_innermost_file_is_named() -> None:
    with pytest.raises(UserError) as caught, located("s.yaml", key="budget"), located("b.yaml"):
        raise UserError("invalid size", field="crop", value=[0, 32])
    assert str(caught.value) == "b.yaml: crop: [0, 32]: invalid size"


def test_flag_of_a_nested_field_and_of_underscores() -> None:
    assert UserError("is wrong", field="settings.lr", value="x").for_command_line() == "--set lr=x: is wrong"
    assert UserError("is wrong", field="settings.lr").for_command_line() == "--set lr: is wrong"
    assert UserError("is wrong", field="cache_size", value="").for_command_line() == "--cache-size '': is wrong"


def test_error_survives_another_process() -> None:
    error = UserError("no such method", field="method", value="spn", hint="did you mean spm?").at("s.yaml")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "spn", NO_METHOD),
        ("head", "upper", NO_HEAD),
        ("backbone", "resnet110", NO_BACKBONE),
        ("dataset", "landcove", NO_DATASET),
        ("budget", "dem", NO_BUDGET),
    ],
)
def test_same_typo_by_flag_recipe_and_study(
    tmp_path: Path, colours: Path, tiny: Path, field: str, value: str, message: str
) -> None:
    where = ("--runs", tmp_path / "runs", "--data", tmp_path / "data")
    assert refusal("run", f"--{field}", value, *where).startswith(f"--{field} {message}")

    recipe = write(tmp_path / "cell.yaml", {field: value})
    assert refusal("run", "--from", recipe, *where).startswith(f"{recipe}: {field}: {message}")

    good = write(tmp_path / "good.yaml", {"method": "linear", "dataset": "landcover"})
    assert refusal("run", "--from", good, f"--{field}", value, *where).startswith(f"--{field} {message}")

    key = "budget" if field == "budget" else f"{field}s"
    study = write_study(tmp_path / "s.yaml", colours, tiny, **{key: value if key == "budget" else [value]})
    assert refusal("compare", study, *where).startswith(f"{study}: {key}: {message}")
    assert refusal("compare", study, "--plan", *where).startswith(f"{study}: {key}: {message}")

    study = write_study(tmp_path / "good_study.yaml", colours, tiny)
    assert refusal("compare", study, f"--{field}", value, *where).startswith(f"--{field} {message}")
    assert runs_in(tmp_path / "runs") == []


def test_wrong_hyperparameter_by_flag_recipe_and_study(tmp_path: Path, colours: Path, tiny: Path) -> None:
    where = ("--runs", tmp_path / "runs", "--data", tmp_path)
    wrong = "x: expected a number"
    assert refusal("run", "--set", "lr=x", *where).startswith("--set lr=x: expected a number")
    recipe = write(tmp_path / "cell.yaml", {"settings": {"lr": "x"}})
    assert refusal("run", "--from", recipe, *where).startswith(f"{recipe}: settings.lr: {wrong}")
    for fields, key in (
        ({"methods": ["linear", {"method": "spm", "settings": {"lr": "x"}}]}, "methods[1].settings.lr"),
        ({"overrides": [{"method": "spm", "settings": {"lr": "x"}}]}, "overrides[0].settings.lr"),
    ):
        study = write_study(tmp_path / "s.yaml", colours, tiny, **fields)
        assert refusal("compare", study, *where).startswith(f"{study}: {key}: {wrong}")


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"parameters": ["hiden"]}, "tune.parameters: hiden: no method of the study has it; did you mean hidden?"),
        ({"space": {"lr": "1:0.5"}}, "tune.space.lr: 1:0.5: use LOW:HIGH"),
        ({"space": {"lr": "x|y"}}, "tune.space.lr: x|y: expected a number"),
        ({"sampler": "tpr"}, "tune.sampler: tpr: no such sampler; did you mean tpe?"),
        ({"pruner": "mediant"}, "tune.pruner: mediant: no such pruner; did you mean median?"),
    ],
)
def test_wrong_search_in_a_study(tmp_path: Path, colours: Path, tiny: Path, tune: dict[str, Any], message: str) -> None:
    study = write_study(tmp_path / "s.yaml", colours, tiny, tune={"trials": 2, **tune})
    assert refusal("compare", study, "--runs", tmp_path / "runs").startswith(f"{study}: {message}")


def test_wrong_field_of_a_budget_is_of_its_file(tmp_path: Path, colours: Path, tiny: Path) -> None:
    budget = write(tmp_path / "b.yaml", {"base": "demo", "crop": [0, 32]})
    message = f"{budget}: crop: [0, 32]: invalid size"
    assert refusal("run", "--budget", budget).startswith(message)
    assert refusal("run", "--from", write(tmp_path / "cell.yaml", {"budget": str(budget)})).startswith(message)
    study = write_study(tmp_path / "s.yaml", colours, tiny, budget="b.yaml")
    assert refusal("compare", study, "--runs", tmp_path / "runs").startswith(message)
    study = write_study(tmp_path / "t.yaml", colours, tiny, budget={"base": "demo", "crop": [0, 32]})
    assert refusal("compare", study, "--runs", tmp_path / "runs").startswith(f"{study}: budget.crop: [0, 32]: invalid")


def test_wrong_field_of_a_dataset_is_of_its_file(tmp_path: Path) -> None:
    description = write(tmp_path / "mine" / "dataset.yaml", {"classes": ["a", "a"]})
    message = f"{description}: classes: a: is listed twice"
    assert refusal("run", "--dataset", description.parent) == message
    assert refusal("run", "--dataset", "mine", "--data", tmp_path) == message


def test_missing_dataset_only_fails_its_own_cells(tmp_path: Path, colours: Path, tiny: Path) -> None:
    study = write_study(tmp_path / "s.yaml", colours, tiny, datasets=["ade20k", str(colours)], methods=["linear"])
    plan = make_plan(load_study(study), RunStore(tmp_path / "runs"), tmp_path)
    assert [cell.state for cell in plan.cells] == ["no data", "to do"]
    assert str(plan.cells[0].reason).startswith(f"dataset ade20k: not found under {tmp_path}")


def write(path: Path, fields: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def write_study(path: Path, colours: Path, tiny: Path, **fields: Any) -> Path:
    usual = {
        "methods": ["linear", "spm"],
        "backbones": [{"backbone": "resnet10t", "weights": "random"}],
        "datasets": [str(colours)],
        "heads": ["fpn:16"],
        "budget": str(tiny),
    }
    return write(path, {**usual, **fields})
