"""`tune.head`: one learning rate of the head for every row, found with `linear`; rows wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.cells.resolve import Resolver
from harness.errors import UserError
from harness.runs.state import RunState
from harness.runs.store import RunStore
from reports.read.collect import collect
from studies.plan import Plan, make_plan
from studies.progress import describe, table
from studies.replacements import Replacements
from studies.search.search import Search
from studies.search.spec import Range, SearchFolder, Trial, TrialState
from studies.study import load_study
from tests.support.in_process import call, refusal
from tests.support.studies_at_hand import finish, write_study


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"methods": ["linear", {"method": "spm", "settings": {"head_lr": 0.01}}]}, "the settings of methods[1]"),
        ({"overrides": [{"settings": {"head_lr": 0.01}}]}, "the settings of overrides[0]"),
        ({"parameters": ["lr", "head_lr"]}, "tune.parameters"),
        ({"space": {"head_lr": "0.1|0.2"}}, "tune.space"),
        ({"methods": [{"method": "spm", "space": {"head_lr": "0.1|0.2"}}]}, "the space of methods[0]"),
    ],
)
def test_head_lr_that_is_tuned_and_set_at_once_is_refused(
    tmp_path: Path, colours: Path, fields: dict[str, Any], place: str
) -> None:
    tune = {"head": {"trials": 2}, "trials": 2, "parameters": ["lr"]}
    tune |= {name: fields[name] for name in ("parameters", "space") if name in fields}
    study = write_study(tmp_path / "s.yaml", colours, tune=tune, **{k: v for k, v in fields.items() if k not in tune})
    with pytest.raises(UserError) as raised:
        load_study(study).check(tmp_path, tmp_path)
    assert str(raised.value).startswith(f"{study}: tune.head: tunes head_lr for every row, and ") and place in str(
        raised.value
    )


def test_invalid_range_of_the_head_names_its_key(tmp_path: Path, colours: Path) -> None:
    study = write_study(tmp_path / "s.yaml", colours, tune={"head": {"trials": 2, "space": "1:x"}, "trials": 2})
    with pytest.raises(UserError, match=r"tune\.head\.space: 1:x"):
        load_study(study).check(tmp_path, tmp_path)


def test_rows_wait_for_the_learning_rate_of_the_head(tmp_path: Path, colours: Path) -> None:
    tune = {"head": {"trials": 2, "space": "0.001|0.01|0.1"}, "trials": 3, "parameters": ["lr"], "sampler": "grid",
            "space": {"lr": "0.001|0.002|0.003"}}  # fmt: skip
    store = RunStore(tmp_path)
    study = load_study(write_study(tmp_path / "s.yaml", colours, tune=tune))

    def plan() -> Plan:
        return make_plan(study, store, tmp_path)

    before = plan()
    assert {cell.state for cell in before.cells} == {RunState.WAITING}
    (head,) = before.heads
    assert [row.folder for row in before.searches] == [None, None] and head.folder is not None
    end_trials(head.folder, [0.3, 0.5], [{"head_lr": 0.01}, {"head_lr": 0.1}])

    linear, spm = plan().searches
    assert {cell.state for cell in linear.cells} == {RunState.TO_DO}
    assert {cell.request.settings["head_lr"] for cell in linear.cells} == {0.1}
    assert {cell.state for cell in spm.cells} == {RunState.WAITING}
    assert spm.folder is not None and spm.folder.spec.fixed["head_lr"] == 0.1
    assert linear.doubts() == ["head_lr=0.1 is the highest tried"]
    end_trials(spm.folder, [0.1, 0.4, 0.2], [{"lr": 0.001}, {"lr": 0.002}, {"lr": 0.003}])

    _, spm = plan().searches
    assert all(cell.request.settings == {"head_lr": 0.1, "lr": 0.002} for cell in spm.cells)
    columns = ("trials", "lr", "head_lr", "state")
    assert [tuple(line[column] for column in columns) for line in table(plan())] == [
        ("2/2", "-", "0.1", "done, head_lr=0.1 is the highest tried"),
        ("-", "-", "0.1", "to do, head_lr=0.1 is the highest tried"),
        ("3/3", "0.002", "0.1", "to do, head_lr=0.1 is the highest tried"),
    ]


def test_equal_trials_are_reported(tmp_path: Path, colours: Path) -> None:
    tune = {"head": {"trials": 2, "space": [0.001, 0.1]}, "trials": 3, "parameters": ["lr"]}
    study, store = load_study(write_study(tmp_path / "s.yaml", colours, tune=tune)), RunStore(tmp_path)
    (head,) = make_plan(study, store, tmp_path).heads
    assert head.folder is not None
    end_trials(head.folder, [0.3, 0.3], [{"head_lr": 0.001}, {"head_lr": 0.1}])
    assert table(make_plan(study, store, tmp_path))[0]["state"] == "done, all 2 trials of head_lr score the same"

    *_, spm = make_plan(study, store, tmp_path).searches
    assert spm.folder is not None
    end_trials(spm.folder, [0.4, 0.5, 0.4], [{"lr": 0.001}, {"lr": 0.002}, {"lr": 0.003}])
    *_, line = table(make_plan(study, store, tmp_path))
    assert line["state"].endswith(", 1 of 3 trials repeat another's score, all 2 trials of head_lr score the same")


def test_plan_warns_of_values_outside_of_declared_ranges(tmp_path: Path, colours: Path) -> None:
    head, space = {"trials": 2, "space": [0.001, 0.5]}, {"lr": "1e-4:0.1"}
    tune = {"head": head, "trials": 2, "parameters": ["lr"], "space": space}
    study = load_study(write_study(tmp_path / "s.yaml", colours, tune=tune))
    warned = [line for line in describe(make_plan(study, RunStore(tmp_path), tmp_path)) if "declared" in line]
    assert warned == [
        "  warning: head_lr, with linear: head_lr=0.5 is outside its declared range 0.0001:0.1:log",
        "  warning: spm: lr=0.1 is outside its declared range 0.0001:0.03:log",
    ]
    study = load_study(write_study(tmp_path / "s.yaml", colours, tune=tune | {"space": {}, "head": {"trials": 2}}))
    assert "declared" not in "".join(describe(make_plan(study, RunStore(tmp_path), tmp_path)))


def test_rows_fail_with_the_reason_if_no_trial_of_the_head_is_complete(tmp_path: Path, colours: Path) -> None:
    tune = {"head": {"trials": 1}, "trials": 3, "parameters": ["lr"]}
    study = load_study(write_study(tmp_path / "s.yaml", colours, tune=tune))
    store = RunStore(tmp_path)
    (head,) = make_plan(study, store, tmp_path).heads
    assert head.folder is not None
    head.folder.begin()
    head.folder.write([Trial(0, TrialState.FAILED, {"head_lr": 1.0}, reason="the loss was not finite")])
    cells = make_plan(study, store, tmp_path).cells
    assert {cell.state for cell in cells} == {RunState.FAILED}
    reason = "no head_lr: none of 1 trials is complete, most often: the loss was not finite"
    assert {cell.reason for cell in cells} == {reason}


def test_report_marks_values_at_the_edge_of_their_range(tmp_path: Path, colours: Path) -> None:
    tune = {"head": {"trials": 2, "space": "0.001|0.01|0.1"}, "trials": 1, "parameters": ["lr"]}
    path, runs = write_study(tmp_path / "s.yaml", colours, tune=tune), tmp_path / "runs"
    (head,) = make_plan(load_study(path), RunStore(runs), tmp_path).heads
    assert head.folder is not None
    end_trials(head.folder, [0.3, 0.5], [{"head_lr": 0.01}, {"head_lr": 0.1}])
    linear = make_plan(load_study(path), RunStore(runs), tmp_path).searches[0]
    for cell in linear.cells:
        assert cell.spec is not None
        finish(runs, cell.spec)
    rows = collect(runs, path, tmp_path).runs
    assert set(rows.loc[rows["label"] == "linear", "doubts"]) == {"head_lr=0.1 is the highest tried"}
    assert set(rows.loc[rows["label"] == "spm", "doubts"]) == {""}  # its own search has not ended
    report = call("report", path, "--runs", runs, "--data", tmp_path, "--out", tmp_path / "report")
    assert report.code == 0, report.err
    text = "".join(f.read_text(encoding="utf-8") for f in (tmp_path / "report" / "tables").glob("*.md"))
    assert "about its search: head\\_lr=0.1 is the highest tried" in text


def test_report_notes_a_row_that_searches_its_own_range(tmp_path: Path, colours: Path) -> None:
    rows, runs = ["linear", {"method": "full", "space": {"lr": [1e-5, 1e-4, 1e-3]}}], tmp_path / "runs"
    tune = {"trials": 3, "parameters": ["lr"], "space": {"lr": "0.01|0.1"}}
    path = write_study(tmp_path / "s.yaml", colours, methods=rows, tune=tune)
    (search,) = make_plan(load_study(path), RunStore(runs), tmp_path).searches
    assert search.folder is not None
    end_trials(search.folder, [0.3, 0.5, 0.4], [{"lr": 1e-5}, {"lr": 1e-4}, {"lr": 1e-3}])
    for cell in make_plan(load_study(path), RunStore(runs), tmp_path).cells:
        assert cell.spec is not None
        finish(runs, cell.spec)
    rows_read = collect(runs, path, tmp_path).runs
    found = {label: set(group["doubts"]) for label, group in rows_read.groupby("label")}
    assert found == {"linear": {""}, "full": {"lr over 1e-05|0.0001|0.001, its own range"}}
    report = call("report", path, "--runs", runs, "--data", tmp_path, "--out", tmp_path / "report")
    assert report.code == 0, report.err
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "about its search: lr over 1e-05|0.0001|0.001, its own range" in page


def end_trials(folder: SearchFolder, values: list[float], settings: list[dict[str, Any]]) -> None:
    """Record complete trials in a search's folder."""
    folder.begin()
    pairs = enumerate(zip(values, settings, strict=True))
    folder.write([Trial(n, TrialState.COMPLETE, own, f"{n:016}", (), [value]) for n, (value, own) in pairs])


@pytest.mark.parametrize(
    ("range_", "value", "edge"),
    [
        (Range(low=1e-4, high=1e-2, log=True), 9.9e-3, "highest"),
        (Range(low=1e-4, high=1e-2, log=True), 1e-3, None),
        (Range(low=1e-4, high=1e-2, log=True), 1.01e-4, "lowest"),
        (Range(low=8, high=64, integer=True), 64, "highest"),
        (Range(choices=(3, 5, 7)), 5, None),
        (Range(choices=(3, 5, 7)), 3, "lowest"),
        (Range(choices=("a", "b")), "a", None),
        (Range(choices=(True, False)), True, None),
    ],
)
def test_value_at_the_edge_of_its_range(range_: Range, value: Any, edge: str | None) -> None:
    assert range_.edge(value) == edge


def test_list_of_values_is_tried_value_by_value(tmp_path: Path, colours: Path) -> None:
    tune = {"head": {"trials": 3, "space": "0.001|0.003|0.01"}, "trials": 2, "parameters": ["lr"]}
    study = load_study(write_study(tmp_path / "s.yaml", colours, tune=tune))
    store = RunStore(tmp_path)
    (head,) = make_plan(study, store, tmp_path).heads
    assert head.folder is not None and head.folder.spec.sampler == "grid"
    with Search(head.request, head.space, 3, store, Resolver(store, tmp_path), sampler="grid", warn=print) as search:
        jobs = [search.next() for _ in range(3)]
    assert {job.request.settings["head_lr"] for job in jobs if job} == {0.001, 0.003, 0.01}
    assert study.tune is not None
    ranges, lists = {"lr": Range(low=1e-4, high=1e-2, log=True)}, {"lr": Range(choices=(0.1, 0.2))}
    assert (study.tune.sampler_of(ranges), study.tune.trials_of(ranges, 5)) == ("tpe", 5)
    assert (study.tune.sampler_of(lists), study.tune.trials_of(lists, 5)) == ("grid", 2)  # no value twice


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"sampler": "grid", "space": {"lr": "0.1|0.2"}, "head": {"trials": 3, "space": "0.1|0.2"}},
         "tune.head.trials: 3: the grid of head_lr has only 2 points; use a smaller number"),
        ({"sampler": "grid", "head": {"trials": 2, "space": "0.1|0.2"}}, "tune.sampler: grid: lr=0.0001:0.03:log is"),
        ({"sampler": "grid", "space": {"lr": "0.1|0.2"}, "trials": 5}, "tune.trials: 5: the grid of lr has only 2"),
        ({"head": True}, "tune.head: True: expected the fields `space` and `trials`, or nothing"),
        ({"pruner": "median", "seeds": 2}, "tune.pruner: median: only prunes trials of one seed, and `seeds` has 2"),
    ],
)  # fmt: skip
def test_search_that_cannot_work_is_refused_by_the_plan(
    tmp_path: Path, colours: Path, tune: dict[str, Any], message: str
) -> None:
    study = write_study(tmp_path / "s.yaml", colours, tune={"trials": 2, "parameters": ["lr"], **tune})
    assert refusal("compare", study, "--plan", "--runs", tmp_path / "runs").startswith(f"{study}: {message}")


def test_method_of_a_flag_need_not_have_the_parameters_of_the_file(tmp_path: Path, colours: Path) -> None:
    study = write_study(tmp_path / "s.yaml", colours, tune={"head": {"trials": 1}, "trials": 2, "parameters": ["lr"]})
    chosen = load_study(study, Replacements(methods=("linear",)))
    (row,) = make_plan(chosen, RunStore(tmp_path), tmp_path).searches
    assert (row.label, row.space, row.trials) == ("linear", {}, 0)


def test_row_whose_own_parameters_are_all_fixed_only_waits_for_the_head(tmp_path: Path, colours: Path) -> None:
    rows = [{"method": "linear", "settings": {"weight_decay": 0.0}}]
    study = load_study(
        write_study(tmp_path / "s.yaml", colours, methods=rows, tune={"head": {"trials": 1}, "trials": 2})
    )
    plan = make_plan(study, RunStore(tmp_path), tmp_path)
    assert {cell.state for cell in plan.cells} == {RunState.WAITING} and plan.searches[0].space == {}


def test_overrides_that_apply_to_linear_reach_the_search_of_the_head(tmp_path: Path, colours: Path) -> None:
    overrides = [
        {"settings": {"weight_decay": 0.5}},
        {"method": "spm", "settings": {"hidden": 8, "weight_decay": 0.1}},
    ]
    tune = {"head": {"trials": 1}, "trials": 2, "parameters": ["lr"]}
    study = load_study(write_study(tmp_path / "s.yaml", colours, overrides=overrides, tune=tune))
    (head,) = make_plan(study, RunStore(tmp_path), tmp_path).heads
    assert head.request.settings == {"weight_decay": 0.5}


def test_estimate_counts_the_seeds_of_each_trial(tmp_path: Path, colours: Path) -> None:
    tune = {"head": {"trials": 2}, "trials": 3, "parameters": ["lr"], "seeds": 2}
    plan = make_plan(load_study(write_study(tmp_path / "s.yaml", colours, tune=tune)), RunStore(tmp_path), tmp_path)
    plan.cells[0].seconds = 10.0
    assert plan.seconds_left() == 10 * (4 + 2 * (2 + 3))  # linear has no search of its own
