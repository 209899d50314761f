"""A study file is checked as a whole, in one line that names the file and the field."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.runs.store import RunStore
from studies import shipped_studies
from studies.plan import make_plan
from studies.progress import describe, table
from studies.replacements import Replacements
from studies.study import Study, load_study
from tests.support.studies_at_hand import write_study


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_study(path)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


def test_cells_are_the_product_of_all_lists(tmp_path: Path, colours: Path) -> None:
    path = write_study(tmp_path / "s.yaml", colours, heads=["fpn:16", "linear"], seeds=[3, 5])
    plan = make_plan(load_study(path), RunStore(tmp_path / "runs"), tmp_path)
    found = [(cell.label, cell.request.head, cell.request.seed) for cell in plan.cells]
    assert found == [(m, h, s) for h in ("fpn:16", "linear") for m in ("linear", "spm") for s in (3, 5)]
    assert len({cell.fingerprint for cell in plan.cells}) == 8
    assert {cell.state for cell in plan.cells} == {"to do"}


def test_rows_of_one_method_only_differ_in_their_settings(tmp_path: Path, colours: Path) -> None:
    rows = [
        "spm",
        {"method": "spm", "settings": {"hidden": 8}},
        {"method": "spm", "label": "bare", "settings": {"auxiliary": 0}},
    ]
    plan = make_plan(
        load_study(write_study(tmp_path / "s.yaml", colours, methods=rows, seeds=1)), RunStore(tmp_path), tmp_path
    )
    assert [cell.label for cell in plan.cells] == ["spm", "spm(hidden=8)", "bare"]
    specs = [cell.spec for cell in plan.cells]
    assert all(spec is not None for spec in specs)
    assert [(s.hyperparameters["hidden"], s.hyperparameters["auxiliary"]) for s in specs if s] == [
        (32, 0.4),
        (8, 0.4),
        (32, 0),
    ]


def test_override_changes_matching_cells_only(tmp_path: Path, colours: Path) -> None:
    overrides = [
        {"method": "lin*", "backbone": "*resnet", "settings": {"head_lr": 0.5}},
        {"backbone": "*", "method": "s*", "settings": {"hidden": 8}},
    ]
    path = write_study(tmp_path / "s.yaml", colours, overrides=overrides, seeds=1)
    plan = make_plan(load_study(path), RunStore(tmp_path), tmp_path)
    assert [cell.spec and cell.spec.hyperparameters["head_lr"] for cell in plan.cells] == [0.5, 0.003]
    assert [cell.spec and cell.spec.hyperparameters.get("hidden") for cell in plan.cells] == [None, 8]
    path = write_study(tmp_path / "t.yaml", colours, overrides=[{"method": "spm", "budget": "20k"}])
    assert refused(path).startswith("overrides[0].settings: ") or "budget" in refused(path)


def test_override_that_matches_nothing_is_refused(tmp_path: Path, colours: Path) -> None:
    overrides = [{"backbone": "resnett*", "settings": {"head_lr": 0.1}}]
    path = write_study(tmp_path / "s.yaml", colours, overrides=overrides, seeds=1)
    with pytest.raises(UserError, match=r"s.yaml: overrides\[0\]: no cell of the study matches {'backbone': 'resnett"):
        load_study(path).check(tmp_path, tmp_path)
    chosen = load_study(path, Replacements(methods=("linear",)))  # a part of the study, which it need not match
    assert len(make_plan(chosen, RunStore(tmp_path), tmp_path).cells) == 1


def test_paths_are_relative_to_the_file(tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "mine").symlink_to(colours)
    path = write_study(tmp_path / "studies" / "s.yaml", Path("../mine"), seeds=1)
    monkeypatch.chdir("/")
    plan = make_plan(load_study(path), RunStore(tmp_path / "runs"), tmp_path)
    assert [cell.state for cell in plan.cells] == ["to do", "to do"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": ["spm"]}, "method: no such field; did you mean methods?"),
        ({"methods": []}, "methods: "),
        ({"methods": ["spm", "spm"]}, "methods: spm: is listed twice; set a `label` for each row of a method"),
        ({"methods": [{"method": "spm", "lable": "x"}]}, "methods[0].lable: no such field"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": 0}, "seeds: "),
        ({"tune": {"trials": 0}}, "tune.trials: 0: "),
        ({"tune": {"trials": True}}, "tune.trials: True: expected a number"),
        ({"tune": {"trials": 10**9}}, "tune.trials: 1000000000: "),
        ({"seeds": [-1]}, "seeds[0]: -1: "),
        ({"seeds": [True]}, "seeds[0]: True: expected a number"),
        ({"seeds": [2**31]}, "seeds[0]: 2147483648: "),
        ({"seeds": 10**9}, "seeds: 1000000000: use 1 to 10000 seeds"),
        ({"seeds": list(range(20_000))}, "seeds: [0, 1"),
        ({"methods": [{"method": "spm", "label": "x" * 101}]}, "methods[0].label: xxx"),
        ({"methods": [{"method": "spm", "label": str(n)} for n in range(11)], "seeds": 10_000}, "110,000 cells; use"),
        ({"tune": {"trails": 3}}, "tune."),
    ],
)
def test_invalid_field_is_named(tmp_path: Path, colours: Path, fields: dict, said: str) -> None:
    assert refused(write_study(tmp_path / "s.yaml", colours, **fields)).startswith(said)


def test_invalid_budget_is_named(tmp_path: Path, colours: Path) -> None:
    study = load_study(write_study(tmp_path / "s.yaml", colours, budget={"base": "demo", "stepps": 3}))
    with pytest.raises(UserError, match=r"s\.yaml: budget\.stepps: no such field; did you mean steps\?"):
        study.the_budget()


def test_file_that_is_not_a_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- spm\n")
    assert refused(tmp_path / "list.yaml").startswith("expected the fields of a study")
    (tmp_path / "broken.yaml").write_text("methods: [")
    assert refused(tmp_path / "broken.yaml").startswith("not YAML")
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="tradeof: no such study; did you mean tradeoff"):
        load_study("tradeof")


def test_unknown_parameter_to_tune_is_refused(tmp_path: Path, colours: Path) -> None:
    study = load_study(write_study(tmp_path / "s.yaml", colours, tune={"trials": 2, "parameters": ["hiden"]}))
    with pytest.raises(
        UserError, match=r"tune\.parameters: hiden: no method of the study has it; did you mean hidden\?"
    ):
        make_plan(study, RunStore(tmp_path), tmp_path)


def test_row_searches_its_own_range_in_place_of_the_study_s(tmp_path: Path, colours: Path) -> None:
    rows = ["spm", {"method": "full", "space": {"lr": [1e-5, 1e-4]}}, {"method": "lora", "space": {"rank": "2|8"}}]
    tune = {"trials": 4, "parameters": ["lr"], "space": {"lr": [0.001, 0.01]}}
    path = write_study(tmp_path / "s.yaml", colours, methods=rows, tune=tune)
    study = load_study(path)
    study.check(tmp_path, tmp_path)
    searches = make_plan(study, RunStore(tmp_path / "runs"), tmp_path).searches
    found = [{name: str(range_) for name, range_ in search.space.items()} for search in searches]
    assert found == [{"lr": "0.001|0.01"}, {"lr": "1e-05|0.0001"}, {"lr": "0.001|0.01", "rank": "2|8"}]
    assert [search.trials for search in searches] == [2, 2, 4]
    said = describe(make_plan(study, RunStore(tmp_path / "runs"), tmp_path))
    assert "  full searches lr over 1e-05|0.0001, its own range" in said and "spm searches" not in " ".join(said)
    load_study(path, Replacements(trials=0)).check(tmp_path, tmp_path)  # nothing is searched, and the rows are no error


@pytest.mark.parametrize(
    ("row", "tuned", "said"),
    [
        ({"space": {"rnk": "2|8"}}, True, "methods[0].space.rnk: 2|8: method lora has no such hyperparameter"),
        ({"space": {"lr": "1:x"}}, True, "methods[0].space.lr: 1:x: expected a number"),
        (
            {"space": {"lr": "1e-4|1e-3"}, "settings": {"lr": 0.1}},
            True,
            "methods[0].space.lr: 1e-4|1e-3: is in `settings` too",
        ),
        ({"space": {"lr": "1e-4|1e-3"}}, False, "methods[0].space: the study has no `tune`, so nothing is searched"),
        (
            {"space": {"lr": 0.001}},
            True,
            "methods[0].space.lr: 0.001: expected LOW:HIGH, LOW:HIGH:log, A|B|C or a list",
        ),
        ({"space": ["lr"]}, True, "methods[0].space: "),
        ({"space": {3: "2|8"}}, True, "methods[0].space[3]: 3: expected a name"),
    ],
)
def test_range_of_a_row_that_cannot_be_searched_is_refused(
    tmp_path: Path, colours: Path, row: dict, tuned: bool, said: str
) -> None:
    tune = {"trials": 2, "parameters": ["lr"]} if tuned else None
    path = write_study(tmp_path / "s.yaml", colours, methods=[{"method": "lora", **row}], tune=tune)
    with pytest.raises(UserError) as error:
        load_study(path).check(tmp_path, tmp_path)
    assert str(error.value).startswith(f"{path}: {said}")


def test_row_of_a_flag_is_named_by_its_label(tmp_path: Path, colours: Path) -> None:
    rows = ["linear", {"method": "full", "label": "low", "space": {"lrr": "0.1|0.2"}}]
    path = write_study(tmp_path / "s.yaml", colours, methods=rows, tune={"trials": 2, "parameters": ["lr"]})
    with pytest.raises(UserError, match=r"s\.yaml: methods\[low\]\.space\.lrr: .* did you mean lr\?"):
        load_study(path, Replacements(methods=("low",))).check(tmp_path, tmp_path)


def test_override_of_what_a_row_searches_is_refused(tmp_path: Path, colours: Path) -> None:
    rows = [{"method": "full", "space": {"lr": "0.1|0.2"}}]
    overrides = [{"method": "f*", "settings": {"lr": 0.1}}]
    tune = {"trials": 2, "parameters": ["lr"]}
    path = write_study(tmp_path / "s.yaml", colours, methods=rows, tune=tune, overrides=overrides)
    with pytest.raises(
        UserError, match=r"overrides\[0\]\.settings\.lr: the row full searches it, in its `space`; remove"
    ):
        load_study(path).check(tmp_path, tmp_path)


def test_grid_that_does_not_fit_a_row_s_range_names_the_row(tmp_path: Path, colours: Path) -> None:
    tune = {"trials": 3, "parameters": ["lr"], "space": {"lr": "0.1|0.2|0.3"}, "sampler": "grid"}
    rows = ["spm", {"method": "full", "space": {"lr": "0.1|0.2"}}]
    path = write_study(tmp_path / "s.yaml", colours, methods=rows, tune=tune)
    with pytest.raises(
        UserError, match=r"tune\.trials: 3: the row full: the grid of lr has only 2 points; give it as many"
    ):
        load_study(path).check(tmp_path, tmp_path)


def test_command_line_replaces_lists_and_reuses_described_rows(tmp_path: Path, colours: Path) -> None:
    rows = ["linear", {"method": "spm", "label": "small", "settings": {"hidden": 8}}]
    path = write_study(tmp_path / "s.yaml", colours, methods=rows, tune={"trials": 4, "parameters": ["lr"]})
    study = load_study(path, Replacements(methods=("small", "lora"), seeds=1, trials=2))
    assert [(arm.label, arm.settings) for arm in study.methods] == [("small", {"hidden": 8}), ("lora", {})]
    assert study.seeds == (0,) and study.tune is not None and (study.tune.trials, study.tune.parameters) == (2, ("lr",))
    assert load_study(path, Replacements(trials=0)).tune is None


@pytest.mark.parametrize("name", shipped_studies())
def test_every_shipped_study_can_be_planned(name: str, tmp_path: Path) -> None:
    for described in ("camvid", "cwfid", "hrf_half"):  # no catalogue has them
        folder = tmp_path / "data" / described
        folder.mkdir(parents=True)
        (folder / "dataset.yaml").write_text("classes: [road, sky]\n")
    study: Study = load_study(name)
    plan = make_plan(study, RunStore(tmp_path), tmp_path / "data")
    sizes = [len(axis) for axis in (study.methods, study.backbones, study.datasets, study.heads, study.seeds)]
    assert len(plan.cells) == prod(sizes)
    reasons = {cell.reason for cell in plan.cells if cell.state == "failed"}
    assert all(str(reason).startswith("dataset ") for reason in reasons), reasons  # files that are not there


def test_compare_calls_linear_with_a_larger_head_head_only(tmp_path: Path, colours: Path) -> None:
    rows = [
        "linear",
        {"method": "linear", "settings": {"head_lr": 0.1}},
        {"method": "linear", "label": "frozen", "settings": {"head_lr": 0.2}},
        "spm",
    ]
    path = write_study(tmp_path / "s.yaml", colours, methods=rows, heads=["fpn:16", "linear"], seeds=1)
    plan = make_plan(load_study(path), RunStore(tmp_path / "runs"), tmp_path)
    shown = {head: [line["method"] for line in table(plan) if line["head"] == head] for head in ("fpn:16", "linear")}
    assert shown["fpn:16"] == ["head only", "head only(head_lr=0.1)", "frozen", "spm"]
    assert shown["linear"] == ["linear", "linear(head_lr=0.1)", "frozen", "spm"]
    assert {cell.label for cell in plan.cells} == {"linear", "linear(head_lr=0.1)", "frozen", "spm"}
