"""The results of a search: recipes, Pareto front, importances, plots, and its trials in MLflow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from harness.cells.recipe import read_recipe
from harness.cells.resolve import resolve
from harness.runs.state import Outcome, RunState
from harness.tracking.mirror import Mirror, sync
from harness.tracking.mlflow_store import EXPERIMENT, PARENT, tracking_uri
from harness.tracking.records import SEARCH
from studies.search.summary import Conclusion
from tests.support.searching import SPACE, STEPS, Place, drive


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, colours: Path, tiny: Path) -> Place:
    return Place(tmp_path_factory.mktemp("found") / "runs", colours, tiny)


def concluded(place: Place, trials: int, **options: object) -> Conclusion:
    with place.open(trials, **options) as search:
        drive(place, search)
        return search.conclude()


@pytest.fixture(scope="module")
def single(place: Place) -> Conclusion:
    """Twelve trials for mIoU. Not to be changed."""
    return concluded(place, 12)


@pytest.fixture(scope="module")
def several(place: Place) -> Conclusion:
    """Twelve trials for mIoU and few trained parameters. Not to be changed."""
    return concluded(place, 12, objectives=("miou", "trained"))


def test_recipe_of_the_best_trial_is_its_cell_on_the_test_split(place: Place, single: Conclusion) -> None:
    ((path, trial),) = single.found.items()
    assert path == single.folder.path / "best.yaml"
    assert trial.values == [max(trial.values[0] for trial in single.trials if trial.values)]
    request = read_recipe(path, {})
    spec = resolve(request, place.store, place.root).spec
    assert spec.part == "report"
    assert spec.model_copy(update={"part": "dev"}).fingerprint == trial.fingerprint
    assert f"trial {trial.number} of search {single.folder.spec.name}".lower() in path.read_text().lower()


def test_every_trial_of_the_pareto_front_has_a_recipe(several: Conclusion) -> None:
    def beaten(values: list[float]) -> bool:
        return any(
            other.values != values and other.values[0] >= values[0] and other.values[1] <= values[1]
            for other in several.trials
            if other.values
        )

    expected = {trial.number for trial in several.trials if trial.values and not beaten(trial.values)}
    assert {trial.number for trial in several.found.values()} == expected
    assert {path.name for path in (several.folder.path / "front").iterdir()} == {f"{n}.yaml" for n in expected}
    figures = [trial.values[0] for trial in several.found.values() if trial.values]
    assert figures == sorted(figures, reverse=True)
    assert not (several.folder.path / "best.yaml").exists()


def test_importances_are_shares_and_favour_the_learning_rate(
    single: Conclusion,
) -> None:
    shares = json.loads((single.folder.path / "importances.json").read_text())
    assert shares == single.importances
    assert shares.keys() == SPACE.keys()
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.get) == "lr"


def test_too_few_trials_have_a_reason_instead_of_importances(place: Place, single: Conclusion) -> None:
    few = concluded(place, 2, sampler="random")
    assert few.importances == "2 complete trials; 10 are needed"
    assert not (few.folder.path / "importances.json").exists()
    assert "no importances: 2 complete trials; 10 are needed" in few.lines()


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("single", {"history", "slice", "importances"}),
        ("several", {"history-miou", "history-trained", "slice-miou", "slice-trained", "importances", "front"}),
    ],
)
def test_plots_are_complete_and_not_empty(request: pytest.FixtureRequest, which: str, names: set[str]) -> None:
    conclusion: Conclusion = request.getfixturevalue(which)
    assert {path.stem for path in conclusion.plots} == names
    for path in conclusion.plots:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1_000_000)) > 10


def test_summary_compares_executed_steps_with_planned_ones(place: Place, single: Conclusion) -> None:
    with place.open(13) as search:
        unfinished = search.conclude()
    assert unfinished.lines()[0] == f"12 of 13 trials: 12 complete; {12 * STEPS} of {13 * STEPS} steps executed"


def test_search_without_complete_trials_has_a_summary(place: Place, tmp_path: Path) -> None:
    with replace(place, root=tmp_path / "runs").open(1) as search:
        job = search.next()
        assert job is not None
        search.ended(job.fingerprint, Outcome(RunState("diverged"), "the loss was not finite at step 1"))
        conclusion = search.conclude()
    assert conclusion.lines() == [
        f"1 of 1 trials: 1 failed; 0 of {STEPS} steps executed",
        "trial 0 failed: diverged: the loss was not finite at step 1",
        "no result: no trial is complete",
        "no importances: 0 complete trials; 10 are needed",
    ]
    assert not (conclusion.folder.path / "best.yaml").exists()


# MLflow


def runs_in_mlflow(place: Place, condition: str) -> list:
    client = MlflowClient(tracking_uri(place.root, None))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], condition))


def test_sync_nests_trials_under_their_search(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = replace(place, root=tmp_path / "runs")
    found = concluded(place, 2)
    assert sync(place.root).failed == {}
    again = sync(place.root)
    assert (again.mirrored, again.failed) == (0, {})
    (parent,) = runs_in_mlflow(place, f"tags.`{SEARCH}` = '{found.folder.spec.name}'")
    children = runs_in_mlflow(place, f"tags.`{PARENT}` = '{parent.info.run_id}'")
    assert {run.data.tags["harness.fingerprint"] for run in children} == {t.fingerprint for t in found.trials}
    assert parent.info.status == "FINISHED"
    assert parent.data.params["sampler"] == "tpe"
    assert json.loads(parent.data.params["space.lr.high"]) == SPACE["lr"].high
    (best,) = found.found.values()
    assert [parent.data.metrics["best/miou"]] == best.values
    assert parent.data.metrics["trials/complete"] == 2


def test_unreachable_tracking_is_a_warning(place: Place, single: Conclusion) -> None:
    warnings: list[str] = []
    mirror = Mirror(place.root, "sqlite:////nowhere/at/all.db", warnings.append)
    assert not mirror.update_search(single.folder.path)
    assert len(warnings) == 1
