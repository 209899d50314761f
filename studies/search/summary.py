"""The results of a search, from its folder alone: recipes to run, importances, plots, and the lines to print."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cells.recipe import write_recipe
from harness.cells.resolve import Request
from harness.spec import budgets
from harness.util.files import write_json, write_text
from studies.search.samplers import directions, make_distributions, make_pruner, quiet_optuna
from studies.search.spec import OBJECTIVES, SearchFolder, SearchSpec, Setting, Trial, TrialState

if TYPE_CHECKING:
    from optuna import Study
    from optuna.importance import BaseImportanceEvaluator

MIN_TRIALS = 10
"""The least number of complete trials for importances."""


@dataclass(frozen=True)
class Conclusion:
    """The results of a search so far."""

    folder: SearchFolder
    trials: list[Trial]
    """Those that have ended."""
    planned: int
    found: dict[Path, Trial]
    """Recipe -> its trial: the best one, or with several objectives the Pareto front."""
    importances: dict[str, float] | str
    """Shares of 1 by hyperparameter, or the reason why there are none."""
    plots: list[Path]

    @property
    def steps(self) -> int:
        """Optimiser steps of all trials."""
        return sum(trial.steps for trial in self.trials)

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder.path),
            "objectives": list(self.folder.spec.objectives),
            "planned": self.planned,
            "trials": [asdict(trial) for trial in self.trials],
            "found": [{"recipe": str(path), "trial": trial.number} for path, trial in self.found.items()],
            "importances": None if isinstance(self.importances, str) else self.importances,
            "plots": list(map(str, self.plots)),
        }

    def lines(self) -> list[str]:
        """The lines to print."""
        spec = self.folder.spec
        counts = Counter(trial.state for trial in self.trials)
        ends = [state for state in TrialState if state is not TrialState.RUNNING and counts[state]]
        states = ", ".join(f"{counts[state]} {state}" for state in ends)
        lines = [
            f"{len(self.trials)} of {self.planned} trials: {states or 'none has ended'}; "
            f"{self.steps:,} of {self.planned * spec.budget.steps:,} steps executed"
        ]
        lines += [
            f"trial {trial.number} failed: {trial.reason}" for trial in self.trials if trial.state is TrialState.FAILED
        ]
        if not self.found:
            lines.append("no result: no trial is complete")
        for path, trial in self.found.items():
            lines += [f"trial {trial.number}: {scores(spec, trial)} with {settings(trial)}", f"  {path}"]
        if isinstance(self.importances, str):
            lines.append(f"no importances: {self.importances}")
        else:
            shares = ", ".join(f"{name} {share:.2f}" for name, share in self.importances.items())
            lines.append(f"importances for {' and '.join(spec.objectives)}: {shares}")
        return lines + [str(path) for path in self.plots]


def conclude(folder: SearchFolder, request: Request, planned: int) -> Conclusion:
    """Write `best.yaml`, or `front/NUMBER.yaml` with several objectives, `importances.json` and the plots.

    `request` is the search's cell; `planned` is its number of trials.
    """
    from studies.search.plots import draw

    trials = folder.trials()[:planned]
    with quiet_optuna():
        study = as_study(folder.spec, trials)
        found = _write_recipes(folder, request, trials, study)
        evaluator, importances = _importances(study)
        target = folder.path / "importances.json"
        if isinstance(importances, str):
            target.unlink(missing_ok=True)
        else:
            write_json(target, importances)
        plots = draw(folder.spec, study, evaluator, folder.path)
    ended = [trial for trial in trials if trial.state is not TrialState.RUNNING]
    return Conclusion(folder, ended, planned, found, importances, plots)


def as_study(spec: SearchSpec, trials: list[Trial]) -> Study:
    """The trials as an Optuna study in memory, from which Optuna computes fronts, importances and plots."""
    import optuna
    from optuna.trial import TrialState as OptunaState
    from optuna.trial import create_trial

    study = optuna.create_study(study_name=spec.name, directions=directions(spec), pruner=make_pruner(spec))
    for trial in trials:
        study.add_trial(
            create_trial(
                state=OptunaState[trial.state.optuna],
                values=trial.values,
                params=trial.settings,
                distributions=make_distributions(spec),
            )
        )
    return study


def _write_recipes(folder: SearchFolder, request: Request, trials: list[Trial], study: Study) -> dict[Path, Trial]:
    front = folder.path / "front"
    if len(folder.spec.objectives) == 1:
        best = folder.best(len(trials))
        found = {folder.path / "best.yaml": best} if best else {}
    else:
        found = {front / f"{trial.number}.yaml": trial for trial in _front(folder.spec, trials, study)}
    for stale in {folder.path / "best.yaml", *front.glob("*.yaml")} - set(found):
        stale.unlink(missing_ok=True)
    for path, trial in found.items():
        write_text(path, recipe(folder.spec, request, trial))
    return found


def _front(spec: SearchSpec, trials: list[Trial], study: Study) -> list[Trial]:
    """The Pareto front, sorted by the first objective, best first; of several trials of one run, only the earliest."""
    numbers = {trial.number for trial in study.best_trials}
    distinct = {trial.fingerprint: trial for trial in reversed(trials) if trial.number in numbers and trial.values}
    maximized = OBJECTIVES[spec.objectives[0]].better == "higher"
    return sorted(distinct.values(), key=lambda trial: trial.values or [], reverse=maximized)


def recipe(spec: SearchSpec, request: Request, trial: Trial) -> str:
    """The trial's cell on the test split, for `harness run --from`, with every hyperparameter."""
    shipped = budgets().get(spec.budget.name) == spec.budget
    cell = replace(
        request,
        part="report",
        budget=spec.budget.name if shipped else spec.budget,
        settings={**spec.fixed, **trial.settings},
    )
    header = (
        f"Trial {trial.number} of search {spec.name}: {scores(spec, trial)}, on the dev split.\n"
        "`harness run --from` trains it on all of train and evaluates it on the test split."
    )
    return write_recipe(cell, header)


def _importances(study: Study) -> tuple[BaseImportanceEvaluator | None, dict[str, float] | str]:
    """PED-ANOVA importances: how much each hyperparameter decides whether a trial is among the best."""
    import optuna

    complete = len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))
    if complete < MIN_TRIALS:
        return None, f"{complete} complete trials; {MIN_TRIALS} are needed"
    # The best tenth, but at least five trials, as Optuna's documentation of the evaluator advises.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, 5 / complete))
    return evaluator, optuna.importance.get_param_importances(study, evaluator=evaluator)


def scores(spec: SearchSpec, trial: Trial) -> str:
    """A complete trial's objectives, as text."""
    pairs = zip(spec.objectives, trial.values or (), strict=True)
    return ", ".join(f"{OBJECTIVES[name].label} {_number(value)}" for name, value in pairs)


def settings(trial: Trial) -> str:
    """A trial's hyperparameters, as text."""

    def text(value: Setting) -> str:
        return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)

    return " ".join(f"{name}={text(value)}" for name, value in trial.settings.items())


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.0f}"
