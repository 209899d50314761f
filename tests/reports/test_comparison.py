"""Comparing methods by the runs that were read: verdicts, ties, classes, dev and test, studies with missing cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from harness.runs.store import RunStore
from reports.analysis.comparison import compare
from reports.read.collect import collect
from reports.report import Options, write_report
from studies.plan import make_plan
from studies.study import load_study
from tests.support.made_runs import (
    make_older,
    make_run,
    make_runs,
    make_spec,
)


def make_study(path: Path, dataset: Path, **fields: object) -> Path:
    """Two methods, two seeds, one tiny network."""
    cells = {
        "methods": ["linear", {"method": "spm", "label": "matcher"}],
        "backbones": [{"backbone": "resnet10t", "weights": "random"}],
        "datasets": [str(dataset)],
        "heads": ["fpn:16"],
        "budget": "demo",
        "seeds": [0, 1],
    }
    path.write_text(yaml.safe_dump(cells | fields))
    return path


def test_study_shows_its_cells_and_no_others(tmp_path: Path, colours: Path) -> None:
    study, root = make_study(tmp_path / "study.yaml", colours), tmp_path / "runs"
    first = make_plan(load_study(study), RunStore(root), tmp_path).cells[0]
    assert first.spec is not None
    make_run(root, first.spec)
    make_run(root, make_spec("full"))
    rows = collect(root, study, tmp_path).reported
    assert rows[["label", "seed", "state"]].to_numpy().tolist() == [
        ["linear", 0, "done"],
        ["linear", 1, "missing"],
        ["matcher", 0, "missing"],
        ["matcher", 1, "missing"],
    ]
    assert rows["setting"].nunique() == 1
    write_report(collect(root, study, tmp_path), [], tmp_path / "out", Options())
    assert "never started" in (tmp_path / "out" / "tables" / "absent.md").read_text()
    assert (tmp_path / "out" / "index.html").exists()


def test_study_without_runs(tmp_path: Path, colours: Path) -> None:
    study = make_study(tmp_path / "study.yaml", colours, tune={"trials": 2})
    (tmp_path / "runs").mkdir()
    collected = collect(tmp_path / "runs", study, tmp_path)
    assert set(collected.runs["setting_name"]) == {"resnet10t, colours, fpn:16, demo, random weights"}
    comparison = compare(collected)
    assert comparison.summary[["label", "seeds", "planned"]].to_numpy().tolist() == [
        ["linear", 0, 2],
        ["matcher", 0, 2],
    ]
    assert comparison.significance.empty


def test_verdicts(tmp_path: Path) -> None:
    accuracies = {"linear": 0.7, "spm": 0.8, "lora": 0.55, "norm": 0.7}
    make_runs(tmp_path, list(accuracies), seeds=[0, 1, 2], accuracies=accuracies, images=30, per_group=2)
    rows = compare(collect(tmp_path)).significance
    rows = rows[rows["reference"] == "linear"].set_index("label")
    assert rows["verdict"].to_dict() == {"spm": "better", "lora": "worse", "norm": "no significant difference"}
    assert (rows["seeds"] == 3).all() and (rows["images"] == 30).all() and (rows["groups"] == 15).all()


@pytest.mark.parametrize(("seeds", "per_group", "why"), [((0,), 1, "one seed"), ((0, 1), 12, "one group of images")])
def test_one_seed_or_one_group_is_no_verdict(tmp_path: Path, seeds: tuple[int, ...], per_group: int, why: str) -> None:
    make_runs(tmp_path, ["linear", "spm"], seeds=seeds, per_group=per_group)
    comparison = compare(collect(tmp_path))
    (row,) = comparison.significance.to_dict("records")
    assert (row["verdict"], row["reason"]) == ("no verdict", why)
    assert row["difference"] > 0 and np.isnan(row["low"]) and np.isnan(row["p"])
    summary = comparison.summary.set_index("label")
    assert summary["to_best"].to_dict() == {"spm": "best", "linear": "no verdict"}
    assert comparison.power.empty


def test_groups_of_newer_runs_are_used_for_older_ones(tmp_path: Path) -> None:
    """Runs before groups were recorded have none in their file."""
    for run in make_runs(tmp_path, ["linear", "spm"], per_group=3):
        make_older(run)
    everything = list(tmp_path.glob("*/confusions.npz"))
    for path in everything[:2]:
        with np.load(path) as stored:
            np.savez(path, **{name: stored[name] for name in stored if name != "groups"})
    (row,) = compare(collect(tmp_path)).significance.to_dict("records")
    assert (row["images"], row["groups"], row["groups_known"]) == (12, 4, True)
    for path in everything[2:]:
        with np.load(path) as stored:
            np.savez(path, **{name: stored[name] for name in stored if name != "groups"})
    (row,) = compare(collect(tmp_path)).significance.to_dict("records")
    assert (row["images"], row["groups"], row["groups_known"]) == (12, 12, False)


def test_holm_corrects_for_the_methods_of_one_comparison(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm", "lora", "norm"])
    rows = compare(collect(tmp_path)).significance
    rows = rows[rows["reference"] == "linear"].sort_values("p")
    assert rows["p_holm"].iloc[0] == pytest.approx(min(1, 3 * rows["p"].iloc[0]))
    assert (rows["p_holm"] >= rows["p"]).all()


def test_comparison_uses_shared_seeds(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear"], seeds=[0, 1, 2])
    make_runs(tmp_path, ["spm"], seeds=[1, 2, 3])
    (row,) = compare(collect(tmp_path)).significance.to_dict("records")
    runs = collect(tmp_path).runs.set_index(["label", "seed"])["miou"]
    assert row["seeds"] == 2
    assert row["difference"] == pytest.approx(np.mean([runs["spm", s] - runs["linear", s] for s in (1, 2)]))


@pytest.mark.parametrize(
    "why", ["no seed in common", "was evaluated on other images", "missing or damaged", "was changed"]
)
def test_incomparable_runs_have_a_reason(tmp_path: Path, why: str) -> None:
    make_run(tmp_path, make_spec("linear"))
    run = make_run(
        tmp_path, make_spec("spm", seed=int(why == "no seed in common")), images=9 if "images" in why else 12
    )
    if why == "missing or damaged":
        make_older(run)
    if why in ("missing or damaged", "was changed"):
        run.confusions_path.write_bytes(b"not a zip")
    (row,) = compare(collect(tmp_path)).significance.to_dict("records")
    assert row["verdict"] == "not comparable"
    assert why in row["reason"]
    assert np.isnan(row["difference"])


def test_best_second_and_tied(tmp_path: Path) -> None:
    accuracies = {"full": 0.8, "spm": 0.798, "linear": 0.6}
    make_runs(tmp_path, list(accuracies), seeds=range(5), accuracies=accuracies, images=30)
    summary = compare(collect(tmp_path)).summary.set_index("label")
    assert set(summary.index[:2]) == {"full", "linear"}
    assert sorted(summary["to_best"][["full", "spm"]]) == ["best", "tied"]
    assert summary["to_best"]["linear"] == "worse"
    assert summary["best"].sum() == summary["second"].sum() == 1 and not summary["best"]["linear"]


def test_spread_is_the_sample_standard_deviation(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"], seeds=[0, 1, 2])
    make_runs(tmp_path, ["full"], seeds=[0])
    collected = collect(tmp_path)
    summary = compare(collected).summary.set_index("label")
    values = collected.runs[collected.runs["label"] == "spm"]["miou"]
    assert summary.loc["spm", ["mean", "std"]].tolist() == pytest.approx([np.mean(values), np.std(values, ddof=1)])
    assert np.isnan(summary.loc["full", "std"])


def test_comparison_by_the_iou_of_a_class(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"], seeds=[0])
    collected = collect(tmp_path)
    comparison = compare(collected, "class:forest")
    of_class = collected.per_class.query("name == 'forest'").set_index("fingerprint")["iou"]
    values = comparison.runs.set_index("fingerprint")["value"]
    assert values.to_dict() == of_class.to_dict()
    (row,) = comparison.significance.to_dict("records")
    assert row["difference"] == pytest.approx(
        of_class[make_spec("spm").fingerprint] - of_class[make_spec("linear").fingerprint]
    )


def test_kendall_tau_between_settings_that_differ_in_one_thing(tmp_path: Path) -> None:
    for (backbone, head), order in {
        ("resnet18", "fpn:64"): (0.6, 0.7, 0.8),
        ("deit_tiny", "fpn:64"): (0.6, 0.8, 0.7),
        ("deit_tiny", "linear"): (0.8, 0.7, 0.6),
    }.items():
        for method, accuracy in zip(("linear", "spm", "full"), order, strict=True):
            make_run(tmp_path, make_spec(method, backbone=backbone, head=head), accuracy)
    agreement = compare(collect(tmp_path)).agreement
    assert agreement[["varied", "methods"]].to_numpy().tolist() == [["backbone", 3], ["head", 3]]
    assert agreement["tau"].tolist() == pytest.approx([1 / 3, -1 / 3])


def test_overall_is_over_methods_that_every_setting_has(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"], datasets=["meadow", "town"])
    make_runs(tmp_path, ["full"])
    overall = compare(collect(tmp_path)).overall.set_index("label")
    assert list(overall.index) == ["spm", "linear"]
    assert overall.loc["spm", ["settings", "rank", "wins", "improvability"]].tolist() == [2, 1, 1, 0]
    assert overall.loc["linear", "elo"] == 1000 < overall.loc["spm", "elo"]
    assert overall["rank_low"].isna().all()


def test_overall_needs_two_settings(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"])
    assert compare(collect(tmp_path)).overall.empty


def test_shares_of_classes_add_up_to_the_difference(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm", "full"])
    comparison = compare(collect(tmp_path))
    keys = ["setting", "reference", "label"]
    shares = comparison.shares.groupby(keys)["share"].sum()
    differences = comparison.significance.set_index(keys)["difference"]
    assert shares.to_dict() == pytest.approx(differences.to_dict())
    assert set(comparison.shares["name"]) == {"water", "forest", "crops", "snow"}
    assert compare(collect(tmp_path), "class:water").shares.empty


def test_best_by_its_own_seeds_can_be_lower_at_shared_ones(tmp_path: Path) -> None:
    for seed, accuracy in enumerate([0.7, 0.7, 0.7, 0.95, 0.95]):
        make_run(tmp_path, make_spec("linear", seed=seed), accuracy, images=40)
    make_runs(tmp_path, ["spm"], seeds=range(3), accuracies={"spm": 0.75}, images=40)
    comparison = compare(collect(tmp_path))
    assert comparison.significance.set_index("label")["verdict"].to_dict() == {"spm": "better"}
    assert comparison.summary.set_index("label")["to_best"].to_dict() == {"linear": "best", "spm": "tied"}


def test_unreadable_run_is_left_out_with_its_reason(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"], seeds=range(4))
    (tmp_path / make_spec("spm", seed=0).fingerprint / "confusions.npz").write_bytes(b"")
    (row,) = compare(collect(tmp_path)).significance.to_dict("records")
    assert (row["seeds"], row["verdict"], row["images"]) == (3, "better", 12)
    assert row["reason"].endswith("confusions.npz was changed after the run ended; run it again")


def test_class_in_one_group_has_no_verdict(tmp_path: Path) -> None:
    for method, hits in (("linear", 20), ("spm", 30)):
        for seed in range(3):
            matrices = np.tile([[80, 20, 0], [10, 90, 0], [0, 0, 0]], (12, 1, 1))
            matrices[0, 2] = [40 - hits - seed, 0, hits + seed]
            make_run(tmp_path, make_spec(method, seed=seed), matrices=matrices, classes=["a", "b", "rare"])
    (row,) = compare(collect(tmp_path), "class:rare").significance.to_dict("records")
    assert (row["verdict"], row["reason"], row["groups"]) == ("no verdict", "one group of images", 1)
    (row,) = compare(collect(tmp_path), "miou").significance.to_dict("records")
    assert (row["groups"], row["rare_classes"]) == (12, 1)


@pytest.mark.parametrize("wrong", ["names", "groups", "shape", "classes"])
def test_matrices_of_another_form_are_damaged(tmp_path: Path, wrong: str) -> None:
    runs = make_runs(tmp_path, ["linear", "spm"])
    make_older(runs[0])
    with np.load(runs[0].confusions_path) as stored:
        fields = {name: stored[name] for name in stored}
    if wrong in ("names", "groups"):
        fields[wrong] = fields[wrong][:-1]
    else:
        fields["shape"] = np.array([12, 4, 5] if wrong == "shape" else [12, 5, 5])
    np.savez(runs[0].confusions_path, **fields)
    (row,) = compare(collect(tmp_path)).significance.to_dict("records")
    assert row["seeds"] == 1 and "confusions.npz is missing or damaged" in row["reason"]


def test_power_by_the_variances_of_a_setting(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm", "lora"], seeds=range(4), images=200)
    (row,) = compare(collect(tmp_path), references=["linear"]).power.to_dict("records")
    seen = compare(collect(tmp_path), references=["linear"]).significance
    assert row["comparisons"] == 2
    assert row["seed_deviation"] == pytest.approx(np.sqrt(seen["seed_variance"].mean()))
    fewer, more = (int(row[name].removesuffix(" seeds")) for name in ("for_a_point", "for_half_a_point"))
    assert 2 <= fewer < more


def test_dev_scores_are_those_of_the_same_hyperparameters(tmp_path: Path) -> None:
    scores = {}
    for number, method in enumerate(["linear", "spm", "lora"]):
        for head_lr in (0.001, 0.01):
            hyperparameters = {"head_lr": head_lr, "weight_decay": 0.01}
            spec = make_spec(method, hyperparameters=hyperparameters, part="dev")
            run = make_run(tmp_path, spec, accuracy=0.6 + 0.05 * number + head_lr)
            if head_lr == 0.01:
                scores[method] = run.read_result().metrics.miou
        make_run(tmp_path, make_spec(method, hyperparameters=hyperparameters), accuracy=0.8 - 0.1 * number)
    rows = compare(collect(tmp_path)).dev_test.set_index("label")
    assert rows["dev"].to_dict() == scores
    assert rows["dev_runs"].tolist() == [1, 1, 1]
    assert rows["tau"].tolist() == [-1, -1, -1]
