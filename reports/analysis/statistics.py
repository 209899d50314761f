"""The statistics of a report: pure functions over arrays, from scipy where it has them.

Images are resampled by weights: a resample of N images is a vector of N numbers, and its confusion matrix their
product with the images' own. All resamples of a run are then one matrix product, where scipy loops over resamples;
the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
"""The level of every interval; one minus it is the level of every test."""
RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate and its percentile interval; NaN where nothing varies that could be resampled."""

    estimate: float
    low: float
    high: float

    @property
    def contains_zero(self) -> bool:
        return not (self.low > 0 or self.high < 0)


def image_counts(matrices: np.ndarray) -> np.ndarray:
    """Confusion matrices int64 [..., K, K] (rows labels) -> [..., 3, K]: hit, labelled and predicted pixels a class.

    All that IoU, accuracy and Dice need, and additive over images as the matrices are.
    """
    hit = np.diagonal(matrices, axis1=-2, axis2=-1)
    return np.stack([hit, matrices.sum(-1), matrices.sum(-2)], axis=-2)


def score(counts: np.ndarray, metric: str | int = "miou") -> np.ndarray:
    """[..., 3, K] -> [...]: `miou`, `macc`, `aacc`, `mdice` (`harness.runs.metrics`), or a class's IoU by index.

    Classes whose denominator is zero are left out of a mean; NaN if none remains.
    """
    hit, labelled, predicted = (counts[..., index, :].astype(float) for index in range(3))
    if metric == "aacc":
        return _ratio(hit.sum(-1), labelled.sum(-1))
    ratios = {
        "macc": lambda: _ratio(hit, labelled),
        "mdice": lambda: _ratio(2 * hit, labelled + predicted),
    }.get(str(metric), lambda: _ratio(hit, labelled + predicted - hit))()
    if isinstance(metric, int):
        return ratios[..., metric]
    defined = ~np.isnan(ratios)
    return _ratio(np.where(defined, ratios, 0).sum(-1), defined.sum(-1).astype(float))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator != 0)


@dataclass(frozen=True)
class Resampled:
    """One run's score: over all its images, and over each of R draws of as many images with replacement."""

    observed: float
    scores: np.ndarray
    """[R]."""


def resample_images(counts: np.ndarray, metric: str | int, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """Resample one run's counts [N, 3, K]. Equal seeds give equal resamples, which pairs runs on the same images."""
    weights = _image_weights(len(counts), resamples, seed)
    return Resampled(float(score(counts.sum(0), metric)), score(_weighted(weights, counts), metric))


@lru_cache(maxsize=2)
def _image_weights(images: int, resamples: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.multinomial(images, np.full(images, 1 / images), resamples).astype(float)


def _weighted(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[R, N] @ [N, 3, K] -> [R, 3, K]. Exact in float64 below 2^53 pixels."""
    return (weights @ counts.reshape(len(counts), -1)).reshape(-1, *counts.shape[1:])


def difference(a: Sequence[Resampled], b: Sequence[Resampled], seed: int = 1) -> Interval:
    """The mean of a - b over runs that are paired one by one, with its interval: see `paired_bootstrap`."""
    differences = np.stack([one.scores - other.scores for one, other in zip(a, b, strict=True)])  # [S, R]
    runs, resamples = differences.shape
    weights = np.random.default_rng(seed).multinomial(runs, np.full(runs, 1 / runs), resamples)
    observed = np.mean([one.observed - other.observed for one, other in zip(a, b, strict=True)])
    return _interval(float(observed), (weights.T * differences).sum(0) / runs)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, metric: str | int = "miou", resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The difference of two methods, a - b, with its interval over images and seeds.

    Counts [S, N, 3, K] of runs that share images and, run by run, seeds. Each resample draws N images, the same for all
    runs, and S seeds, the same for both methods; its statistic is the mean over those seeds of the difference of the
    scores over those images. Percentile interval: Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapters 8 and 13. With one seed the interval is of these two trained networks, not of the methods.
    """
    of_a, of_b = ([resample_images(run, metric, resamples, seed) for run in runs] for runs in (a, b))
    return difference(of_a, of_b, seed=seed + 1)


def _interval(estimate: float, resampled: np.ndarray) -> Interval:
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(resampled, [tail, 100 - tail]) if np.isfinite(resampled).any() else (np.nan, np.nan)
    return Interval(estimate, float(low), float(high))


def paired_permutation_test(
    a: np.ndarray, b: np.ndarray, metric: str | int = "miou", resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """The two-sided p value of the null hypothesis that the two methods' results are exchangeable on every image.

    Counts [S, N, 3, K] as in `paired_bootstrap`. Each permutation exchanges the methods on a random half of the images,
    in all runs alike; p = (1 + permutations whose mean difference is as far from zero) / (1 + permutations), as of
    Phipson and Smyth, Permutation P-values Should Never Be Zero, SAGMB 9, 2010. Exchanging by image asks whether these
    trained networks differ; the bootstrap covers the variation over seeds.
    """
    exchanged = _exchanges(a.shape[1], resamples, seed)
    total = np.zeros(resamples)
    for run_a, run_b in zip(a, b, strict=True):
        moved = _weighted(exchanged, run_b - run_a)
        total += score(run_a.sum(0) + moved, metric) - score(run_b.sum(0) - moved, metric)
    observed = np.mean(score(a.sum(1), metric) - score(b.sum(1), metric))
    if np.isnan(observed):
        return float("nan")
    as_far = np.abs(total / len(a)) >= abs(observed) - 1e-12
    return float((1 + as_far.sum()) / (1 + resamples))


@lru_cache(maxsize=2)
def _exchanges(images: int, permutations: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (permutations, images)).astype(float)


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


def iqm(values: Sequence[float] | np.ndarray) -> float:
    """The mean of the middle half: of n values the int(n / 4) lowest and highest are left out.

    Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, NeurIPS 2021.
    """
    return float(stats.trim_mean(values, 0.25))


def iqm_interval(scores: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The IQM over all settings and seeds. `scores` has one sequence (over seeds) a setting.

    Each resample draws settings, and within each its seeds; settings are what this harness generalises over.
    """
    sizes = np.array([len(one) for one in scores])
    padded = np.full((len(scores), sizes.max()), np.nan)
    for setting, one in enumerate(scores):
        padded[setting, : len(one)] = one
    estimate = iqm(padded[~np.isnan(padded)])
    if padded.size == 1:
        return Interval(estimate, np.nan, np.nan)
    draw = np.random.default_rng(seed)
    settings = draw.integers(0, len(scores), (resamples, len(scores), 1))
    seeds = (draw.random((resamples, *padded.shape)) * sizes[settings]).astype(int)
    absent = np.arange(padded.shape[1]) >= sizes[settings]
    drawn = np.where(absent, np.nan, padded[settings, seeds]).reshape(resamples, -1)
    return _interval(estimate, stats.trim_mean(drawn, 0.25, axis=1, nan_policy="omit"))


def probability_of_improvement(
    x: Sequence[Sequence[float]], y: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The probability that X beats Y in a random setting: the mean over settings of P(X > Y) + P(X = Y) / 2.

    x and y have one sequence of scores (over seeds) a setting; within one, P is Mann and Whitney's U / (n m). Agarwal
    et al., NeurIPS 2021, section 4.3; seeds are resampled within settings as there, and settings as well.
    """
    draw = np.random.default_rng(seed)
    observed, resampled = [], []
    for one, other in zip(x, y, strict=True):
        difference = np.subtract.outer(np.asarray(one, float), np.asarray(other, float))
        won = np.where(difference == 0, 0.5, difference > 0)
        drawn = [draw.multinomial(n, np.full(n, 1 / n), resamples) / n for n in won.shape]
        observed.append(won.mean())
        resampled.append(((drawn[0] @ won) * drawn[1]).sum(1))
    estimate = float(np.mean(observed))
    if all(len(one) == len(other) == 1 for one, other in zip(x, y, strict=True)) and len(observed) == 1:
        return Interval(estimate, np.nan, np.nan)
    settings = draw.multinomial(len(observed), np.full(len(observed), 1 / len(observed)), resamples)
    return _interval(estimate, (settings.T * np.array(resampled)).sum(0) / len(observed))


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b of two orders of the same methods: 1 the same, -1 the reverse; NaN for fewer than two."""
    return float(stats.kendalltau(x, y).statistic) if len(x) > 1 else float("nan")


def ranks(scores: pd.DataFrame) -> pd.DataFrame:
    """Ranks of scores within each cell (row) over the methods (columns): 1 is the best, ties get their mean."""
    return scores.rank(axis="columns", ascending=False)


def pareto_front(cost: Sequence[float] | np.ndarray, value: Sequence[float] | np.ndarray) -> np.ndarray:
    """Mask [n] of the Pareto front: no other point has at most the cost and at least the value, and differs in one."""
    x, y = np.asarray(cost, float), np.asarray(value, float)
    at_least_as_good = (x[None] <= x[:, None]) & (y[None] >= y[:, None])
    better = (x[None] < x[:, None]) | (y[None] > y[:, None])
    return ~(at_least_as_good & better).any(1) & ~np.isnan(x) & ~np.isnan(y)
