"""How Optuna proposes the hyperparameters of one trial, and prunes it: distributions, samplers and pruners by name.

Nothing here writes to the search's storage; `search.py` does.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from harness.errors import UserError
from harness.util.seeds import derive
from studies.search.spec import OBJECTIVES, Range, SearchSpec

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

PRUNER_RECORD = "watched"
"""User attribute of a trial: its `PrunerRecord`."""
SAMPLER_STATE = "harness:memory"
"""System attribute of a trial: what its sampler had stored on the study when it proposed the trial."""


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence Optuna's log and its warnings about experimental functions."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_sampler(sampler: str, space: Mapping[str, Range], trials: int, objectives: int = 1) -> None:
    """Raises `UserError` for a sampler that cannot propose this many trials of a search."""
    if sampler == "cmaes":
        if importlib.util.find_spec("cmaes") is None:
            hint = "pip install cmaes, or use another sampler"
            raise UserError("needs the package cmaes", field="sampler", value=sampler, hint=hint)
        if objectives > 1:
            raise UserError("takes one objective", field="sampler", value=sampler, hint="use nsgaii, or one objective")
    if sampler == "grid":
        for name, range_ in space.items():
            if range_.grid is None:
                hint = "give it a list of values as its space, A|B|C, or use another sampler"
                raise UserError(f"{name}={range_} is continuous", field="sampler", value=sampler, hint=hint)
        points = math.prod(len(range_.grid or ()) for range_ in space.values())
        if trials > points:
            problem = f"the grid of {', '.join(space)} has only {points} points"
            raise UserError(problem, field="trials", value=trials, hint="use a smaller number")


def make_sampler(spec: SearchSpec, number: int) -> BaseSampler:
    """The sampler that proposes trial `number`. Its random numbers only depend on the search's seed and that number."""
    from optuna import samplers

    own = derive(spec.seed, "search", number) % 2**32
    common = derive(spec.seed, "search") % 2**32  # for samplers whose trials are points of one sequence
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
    """With Optuna's own settings, except that the first rung is at a 27th of the steps."""
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
    """`maximize` or `minimize` for each objective."""
    return ["maximize" if OBJECTIVES[name].better == "higher" else "minimize" for name in spec.objectives]


def propose(spec: SearchSpec, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """The trial that comes after these, complete and ready to be stored; nothing is written anywhere.

    The sampler's own state is stored with the trial, so that both are stored together or not at all.
    """
    from optuna.trial import TrialState, create_trial

    memory, study = _in_memory(spec, trials, make_sampler(spec, len(trials)))
    study_id = memory.get_study_id_from_name(spec.name)
    stored: dict[str, Any] = json.loads(trials[-1].system_attrs[SAMPLER_STATE]) if trials else {}
    for key, value in stored.items():
        memory.set_study_system_attr(study_id, key, value)
    distributions = make_distributions(spec)
    asked = study.ask(distributions)
    system = study.get_trials()[asked.number].system_attrs
    return create_trial(
        state=TrialState.RUNNING,
        params=asked.params,
        distributions=distributions,
        system_attrs={**system, SAMPLER_STATE: json.dumps(memory.get_study_system_attrs(study_id))},
    )


class PrunerRecord(TypedDict):
    """The part of a trial that the pruner has seen, and its decision."""

    curve: list[tuple[int, float]]
    """Step and score."""
    noted: dict[str, Any]
    """The values that the pruner stores to compare other trials with this one."""
    pruned_at: int | None
    """The step at which it pruned the trial; None if it did not."""


def replay(
    spec: SearchSpec, trials: Sequence[FrozenTrial], number: int, curve: list[tuple[int, float]]
) -> PrunerRecord:
    """Show the pruner a trial's curve, point by point from its beginning; nothing is written anywhere.

    Its decision depends only on the curve and the other trials, not on when or how often it is called.
    """
    from optuna.trial import Trial

    unseen = copy.copy(trials[number])
    unseen.user_attrs = {}
    memory, study = _in_memory(spec, [*trials[:number], unseen, *trials[number + 1 :]])
    study_id = memory.get_study_id_from_name(spec.name)
    trial = Trial(study, memory.get_trial_id_from_study_id_trial_number(study_id, number))
    pruned_at = None
    for step, score in curve:
        trial.report(score, step)
        if trial.should_prune():
            pruned_at = step
            break
    system = study.get_trials()[number].system_attrs
    noted = {key: value for key, value in system.items() if key not in unseen.system_attrs}
    return PrunerRecord(curve=curve, noted=noted, pruned_at=pruned_at)


def _in_memory(
    spec: SearchSpec, trials: Sequence[FrozenTrial], sampler: BaseSampler | None = None
) -> tuple[BaseStorage, Study]:
    """A copy of the study, to which samplers and pruners may write."""
    import optuna

    memory = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        storage=memory,
        study_name=spec.name,  # Hyperband assigns its brackets by it
        directions=directions(spec),
        sampler=sampler or optuna.samplers.RandomSampler(),
        pruner=make_pruner(spec),
    )
    study.add_trials(_with_pruner_record(trial) for trial in trials)
    return memory, study


def _with_pruner_record(trial: FrozenTrial) -> FrozenTrial:
    record: PrunerRecord | None = trial.user_attrs.get(PRUNER_RECORD)
    if record is None:
        return trial
    seen = copy.copy(trial)
    seen.intermediate_values = dict(record["curve"])
    seen.system_attrs = {**trial.system_attrs, **record["noted"]}
    return seen
