"""What a search stores with a trial in Optuna, and how its value is computed from the runs. Does not import Optuna."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from harness.runs.result import RunResult
from studies.search.spec import OBJECTIVES, SearchSpec, Trial, TrialState

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FINGERPRINT, OTHERS, WORKER = "fingerprint", "others", "worker"
"""User attributes of a trial in Optuna's storage: its run, its runs at further seeds, and its responsible worker."""
STEPS, REASON = "steps", "reason"
"""User attributes of a trial that has ended."""


def mean_objectives(spec: SearchSpec, results: Sequence[RunResult]) -> list[float] | None:
    """The mean of each objective over the runs of a trial; None if one is undefined."""
    found = [[OBJECTIVES[name].of(result) for result in results] for name in spec.objectives]
    if any(value is None or not math.isfinite(value) for values in found for value in values):
        return None
    return [fmean(value for value in values if value is not None) for values in found]


def runs_of(trial: FrozenTrial) -> list[str]:
    """The fingerprints of its runs, in the order of the seeds."""
    return [trial.user_attrs[FINGERPRINT], *trial.user_attrs[OTHERS]]


def as_trial(trial: FrozenTrial) -> Trial:
    """As the search's folder records it."""
    state = TrialState.of(trial.state.name)
    return Trial(
        number=trial.number,
        state=state,
        settings=trial.params,
        fingerprint=trial.user_attrs[FINGERPRINT],
        others=tuple(trial.user_attrs[OTHERS]),
        values=trial.values if state is TrialState.COMPLETE else None,
        steps=trial.user_attrs.get(STEPS, 0),
        reason=trial.user_attrs.get(REASON),
    )
