"""Statistics over methods and settings: pure functions, from scipy where it has them.

Those of one comparison of two methods are in `harness.runs.difference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from harness.runs.difference import LEVEL, Interval

SETTINGS = 5
"""Fewer settings than this say nothing about others."""
RESAMPLES = 1000


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979): the i-th smallest of n p values times
    n - i + 1, and no less than those before it. NaN stays NaN and is not counted.

    statsmodels' version collects garbage at every call, which takes longer than the rest of a report's statistics.
    """
    corrected = np.array(pvalues, float)
    known = np.flatnonzero(~np.isnan(corrected))
    order = known[np.argsort(corrected[known])]
    steps = corrected[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b of two orders of the same methods: 1 the same, -1 the reverse; NaN for fewer than two."""
    return float(stats.kendalltau(x, y).statistic) if len(x) > 1 else math.nan


def pareto_front(cost: Sequence[float] | np.ndarray, value: Sequence[float] | np.ndarray) -> np.ndarray:
    """Mask [n] of the Pareto front: no other point has at most the cost and at least the value, and differs in one."""
    x, y = np.asarray(cost, float), np.asarray(value, float)
    at_least_as_good = (x[None] <= x[:, None]) & (y[None] >= y[:, None])
    better = (x[None] < x[:, None]) | (y[None] > y[:, None])
    return ~(at_least_as_good & better).any(1) & ~np.isnan(x) & ~np.isnan(y)


# ---- over settings ---------------------------------------------------------------------------------------------------
# Scores are an array [settings, methods] in 0..1 without gaps. Each function gives one number per method. The measures
# follow TabArena (Erickson et al., arXiv 2506.16791), with 1 - score as the error.


def mean_ranks(scores: np.ndarray) -> np.ndarray:
    """[settings, methods] -> [methods]: the mean rank over the settings; 1 is the best, ties share their mean rank."""
    return np.asarray(stats.rankdata(-scores, axis=1).mean(0))


def win_rates(scores: np.ndarray) -> np.ndarray:
    """[settings, methods] -> [methods]: the share of comparisons with other methods that a method wins; a tie is half.

    NaN for a single method.
    """
    if scores.shape[1] < 2:
        return np.full(scores.shape[1], np.nan)
    return _wins(scores).sum(1) / (len(scores) * (scores.shape[1] - 1))


def improvability(scores: np.ndarray) -> np.ndarray:
    """[settings, methods] -> [methods]: by what share of a method's error the best method of a setting has a lower one,
    mean over settings; 0 for a method that is the best everywhere.
    """
    errors = 1 - scores
    gap = errors - errors.min(1, keepdims=True)
    return np.divide(gap, errors, out=np.zeros_like(errors), where=errors > 0).mean(0)


def elo(scores: np.ndarray, reference: int = 0) -> np.ndarray:
    """[settings, methods] -> [methods]: Elo ratings. 400 points are odds of ten to one; the reference has 1000.

    The maximum of the Bradley-Terry likelihood of all comparisons in all settings; a standard normal prior on each
    strength keeps the rating of a method that always wins finite.
    """
    wins = _wins(scores)
    played = wins + wins.T
    strength = np.zeros(len(wins))
    for _ in range(50):
        expected = 1 / (1 + np.exp(strength[None] - strength[:, None]))
        slope = (wins - played * expected).sum(1) - strength
        spread = played * expected * (1 - expected)
        step = np.linalg.solve(np.diag(spread.sum(1) + 1) - spread, slope)
        strength += step
        if np.abs(step).max() < 1e-9:
            break
    return 1000 + 400 / math.log(10) * (strength - strength[reference])


def _wins(scores: np.ndarray) -> np.ndarray:
    """[settings, methods] -> [methods, methods]: in how many settings the first beats the second; a tie is half."""
    own, other = scores[:, :, None], scores[:, None, :]
    wins = ((own > other) + 0.5 * (own == other)).sum(0)
    np.fill_diagonal(wins, 0)
    return np.asarray(wins)


def over_settings(statistic: Callable[[np.ndarray], np.ndarray], scores: np.ndarray, seed: int = 0) -> list[Interval]:
    """A statistic of [settings, methods] with its percentile interval over draws of settings, for each method.

    There is no interval for fewer than `SETTINGS`. Settings that share a dataset or a backbone are not independent, and
    the interval is then too narrow.
    """
    estimates = statistic(scores)
    if len(scores) < SETTINGS:
        return [Interval(float(estimate), math.nan, math.nan) for estimate in estimates]
    draw = np.random.default_rng(seed)
    drawn = [statistic(scores[draw.integers(0, len(scores), len(scores))]) for _ in range(RESAMPLES)]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    return [Interval(*map(float, three)) for three in zip(estimates, low, high, strict=True)]


def complete(summary: pd.DataFrame) -> pd.DataFrame:
    """Means: the settings in which any label is done × the labels that are done in each of those."""
    return (
        summary.pivot(index="setting", columns="label", values="mean")
        .dropna(axis="index", how="all")
        .dropna(axis="columns")
    )
