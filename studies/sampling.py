"""How Optuna chooses the hyperparameters of one trial: distributions, samplers and pruners, by name."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.seeds import derive
from studies.searches import OBJECTIVES, Range, SearchSpec

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

MEMORY = "harness:memory"
"""System attribute of a trial: what its sampler had noted on the study when it proposed the trial."""


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Nothing of Optuna's own on the user's terminal: neither its log nor that a function of it is experimental."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_sampler(spec: SearchSpec, trials: int) -> None:
    """Raises `UserError` for a sampler that cannot make so many trials of this search."""
    if spec.sampler == "cmaes":
        if importlib.util.find_spec("cmaes") is None:
            raise UserError("--sampler cmaes: needs the package cmaes; pip install cmaes, or give another sampler")
        if len(spec.objectives) > 1:
            raise UserError("--sampler cmaes: takes one objective; give --sampler nsgaii, or one objective")
    if spec.sampler == "grid":
        for name, range_ in spec.space.items():
            if range_.grid is None:
                raise UserError(f"--sampler grid: {name}={range_} is continuous; give --space {name}=A|B|C")
        points = math.prod(len(range_.grid or ()) for range_ in spec.space.values())
        if trials > points:
            raise UserError(f"--trials {trials}: the grid has {points} points; give at most as many")


def make_sampler(spec: SearchSpec, number: int) -> BaseSampler:
    """The sampler that proposes trial `number`. All that it draws follows from the search's seed and that number."""
    from optuna import samplers

    own = derive(spec.seed, "search", number) % 2**32
    common = derive(spec.seed, "search") % 2**32  # where all trials are points of one sequence
    random = samplers.RandomSampler(seed=own)
    match spec.sampler:
        case "tpe":
            return samplers.TPESampler(seed=own)
        case "random":
            return random
        case "gp":
            return samplers.GPSampler(seed=own)
        case "nsgaii":
            return samplers.NSGAIISampler(seed=own)
        case "cmaes":
            return samplers.CmaEsSampler(seed=own, independent_sampler=random, warn_independent_sampling=False)
        case "qmc":
            return samplers.QMCSampler(
                scramble=True, seed=common, independent_sampler=random, warn_independent_sampling=False
            )
        case "grid":
            return samplers.GridSampler({name: range_.grid or () for name, range_ in spec.space.items()}, seed=common)
        case name:
            raise AssertionError(name)


def make_pruner(spec: SearchSpec) -> BasePruner:
    """With Optuna's own settings but for the unit: the first rung is at a 27th of the steps."""
    from optuna import pruners

    first = max(1, spec.budget.steps // 27)
    match spec.pruner:
        case None:
            return pruners.NopPruner()
        case "median":
            return pruners.MedianPruner(n_warmup_steps=first)
        case "hyperband":
            return pruners.HyperbandPruner(min_resource=first, max_resource=spec.budget.steps)
        case "successive_halving":
            return pruners.SuccessiveHalvingPruner(min_resource=first)
        case name:
            raise AssertionError(name)


def make_distributions(spec: SearchSpec) -> dict[str, BaseDistribution]:
    return {name: _distribution(range_) for name, range_ in spec.space.items()}


def _distribution(range_: Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if range_.choices is not None:
        return CategoricalDistribution(range_.choices)
    assert range_.low is not None and range_.high is not None
    if range_.integer:
        return IntDistribution(int(range_.low), int(range_.high), log=range_.log)
    return FloatDistribution(range_.low, range_.high, log=range_.log)


def directions(spec: SearchSpec) -> list[str]:
    return [OBJECTIVES[name].direction for name in spec.objectives]


def propose(spec: SearchSpec, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """The trial that comes after these, whole and ready to be stored; nothing is written anywhere.

    The sampler works on a copy of the study in memory. What it notes on the study there travels with the trial, so that
    trial and note are stored together or not at all.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    memory = optuna.storages.InMemoryStorage()
    study: Study = optuna.create_study(
        storage=memory,
        study_name=spec.name,  # Hyperband deals its brackets by it
        directions=directions(spec),
        sampler=make_sampler(spec, len(trials)),
        pruner=make_pruner(spec),
    )
    study_id = memory.get_study_id_from_name(spec.name)
    noted: dict[str, Any] = json.loads(trials[-1].system_attrs[MEMORY]) if trials else {}
    for key, value in noted.items():
        memory.set_study_system_attr(study_id, key, value)
    study.add_trials(trials)
    distributions = make_distributions(spec)
    asked = study.ask(distributions)
    system = study.get_trials()[asked.number].system_attrs
    return create_trial(
        state=TrialState.RUNNING,
        params=asked.params,
        distributions=distributions,
        system_attrs={**system, MEMORY: json.dumps(memory.get_study_system_attrs(study_id))},
    )
