"""Whether two methods differ: the paired difference of their scores over seeds and groups of images.

Methods A and B are trained with the same S seeds and evaluated on the same images, in G groups (clips, scenes,
patients: images of one group resemble each other). d_s is the difference of their scores at seed s, over all images,
and the estimate is the mean of the d_s. It varies with the seeds and with the images, so its variance is

    var(d_s) / S  +  the variance over draws of G groups with replacement, times G / (G - 1)

and it is compared with Student's t, whose degrees of freedom follow from the S - 1 and G - 1 of the two parts:
Satterthwaite, An Approximate Distribution of Estimates of Variance Components, Biometrics Bulletin 2, 1946. The second
part is from the bootstrap, since an mIoU is a ratio of sums over images: Efron and Tibshirani, An Introduction to the
Bootstrap, 1993. One seed, or one group, says nothing about the variance of its part, and there is no verdict.

Does not import torch: reports and the plans of studies use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
"""The level of every interval; one minus it is the level of every test."""
POWER = 0.8
RESAMPLES = 1000
FEW_GROUPS = 10
"""Fewer groups than this estimate the variance over images badly."""
MOST_SEEDS = 100
RARE = 5
"""A class that is labelled in fewer groups than this makes verdicts less reliable: docs/statistics.md says how much."""


class Interval(NamedTuple):
    """An estimate and its interval; NaN where there is none."""

    estimate: float
    low: float
    high: float


def image_counts(matrices: np.ndarray) -> np.ndarray:
    """Confusion matrices int64 [..., K, K] (rows labels) -> [..., 3, K]: hit, labelled and predicted pixels per class.

    All that IoU, accuracy and Dice need, and additive over images as the matrices are.
    """
    hit = np.diagonal(matrices, axis1=-2, axis2=-1)
    return np.stack([hit, matrices.sum(-1), matrices.sum(-2)], axis=-2)


def score(counts: np.ndarray, metric: str | int = "miou") -> np.ndarray:
    """[..., 3, K] -> [...]: `miou`, `macc`, `aacc`, `mdice` (`harness.runs.metrics`), or a class's IoU by index.

    Classes whose denominator is zero are left out of a mean; NaN if none remains.
    """
    if isinstance(metric, int):
        return class_scores(counts, "miou")[..., metric]
    if metric == "aacc":
        return _ratio(counts[..., 0, :].sum(-1), counts[..., 1, :].sum(-1))
    return class_shares(counts, metric).sum(-1)


def class_scores(counts: np.ndarray, metric: str) -> np.ndarray:
    """[..., 3, K] -> [..., K]: the IoU, accuracy or Dice of each class; NaN where its denominator is zero."""
    hit, labelled, predicted = (counts[..., index, :].astype(float) for index in range(3))
    if metric == "macc":
        return _ratio(hit, labelled)
    if metric == "mdice":
        return _ratio(2 * hit, labelled + predicted)
    return _ratio(hit, labelled + predicted - hit)


def class_shares(counts: np.ndarray, metric: str) -> np.ndarray:
    """[..., 3, K] -> [..., K]: what each class adds to a score; the sum over classes is the score.

    A class without a score adds nothing; all are NaN where no class has one.
    """
    if metric == "aacc":
        return _ratio(counts[..., 0, :], counts[..., 1, :].sum(-1, keepdims=True))
    scores = class_scores(counts, metric)
    defined = ~np.isnan(scores)
    return _ratio(np.where(defined, scores, 0), defined.sum(-1, keepdims=True).astype(float))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=denominator != 0)


def occurrences(counts: np.ndarray) -> np.ndarray:
    """Counts of groups [G, 3, K] -> int [K]: in how many groups each class is labelled."""
    return np.asarray((counts[:, 1] > 0).sum(0))


def grouped(counts: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """Counts of images [N, 3, K] -> their sums over groups [G, 3, K], in the order of the groups' names.

    Without groups, each image is one, in the given order.
    """
    if groups is None:
        return counts
    names, index = np.unique(np.array(groups, str), return_inverse=True)
    sums = np.zeros((len(names), *counts.shape[1:]), counts.dtype)
    np.add.at(sums, index, counts)
    return sums


@dataclass(frozen=True)
class Resampled:
    """One run's score: over all its images, and over each of R draws of as many groups with replacement."""

    observed: float
    scores: np.ndarray
    """[R]."""
    groups: int


def resample(counts: np.ndarray, metric: str | int = "miou", resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """Resample the groups of one run's counts [G, 3, K]. Equal seeds draw equal groups, which pairs runs.

    All draws are one matrix product, of how often each group was drawn and the groups' counts.
    """
    drawn = _draws(len(counts), resamples, seed) @ counts.reshape(len(counts), -1)  # exact below 2^53 pixels
    scores = score(drawn.reshape(-1, *counts.shape[1:]), metric)
    return Resampled(float(score(counts.sum(0), metric)), scores, len(counts))


@lru_cache(maxsize=2)
def _draws(groups: int, resamples: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.multinomial(groups, np.full(groups, 1 / groups), resamples).astype(float)


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods, A - B, and the parts of its variance."""

    estimate: float
    seed_variance: float
    """Of the difference at one seed. NaN for one seed."""
    image_variance: float
    """Of the estimate, over draws of groups of images. NaN for one group."""
    seeds: int
    groups: int

    @property
    def why_untested(self) -> str | None:
        """The reason why there is neither an interval nor a p; None where there are."""
        if math.isnan(self.estimate):
            return "no score"
        if self.seeds < 2:
            return "one seed"
        if self.groups < 2:
            return "one group of images"
        return None

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.seed_variance / self.seeds + self.image_variance)

    @property
    def degrees_of_freedom(self) -> float:
        return _satterthwaite(self.seed_variance / self.seeds, self.seeds, self.image_variance, self.groups)

    @cached_property
    def interval(self) -> Interval:
        if self.why_untested:
            return Interval(self.estimate, math.nan, math.nan)
        half = self.standard_error * float(stats.t.ppf((1 + LEVEL) / 2, self.degrees_of_freedom))
        return Interval(self.estimate, self.estimate - half, self.estimate + half)

    @cached_property
    def p(self) -> float:
        """Two-sided, for a true difference of zero."""
        return math.nan if self.why_untested else float(2 * stats.t.sf(self._t, self.degrees_of_freedom))

    @property
    def detectable(self) -> float:
        """The true difference that would be significant with probability `POWER`; NaN where there is no test."""
        if self.why_untested:
            return math.nan
        return Variances(self.seed_variance, self.image_variance, self.groups).detectable(self.seeds)

    def differs_among(self, methods: int) -> bool:
        """Whether the difference is significant even if these two were picked from this many `methods`, such as the
        best one and another: by Tukey's studentized range, with these degrees of freedom (Games and Howell, Journal of
        Educational Statistics 1, 1976).
        """
        if self.why_untested or self.p >= 1 - LEVEL:
            return False
        if self.p * math.comb(methods, 2) < 1 - LEVEL:  # Bonferroni, which the range is never stricter than
            return True
        beyond = stats.studentized_range.sf(self._t * math.sqrt(2), methods, self.degrees_of_freedom)
        return bool(beyond < 1 - LEVEL)

    @property
    def _t(self) -> float:
        if self.standard_error == 0:
            return math.inf if self.estimate else 0.0
        return abs(self.estimate) / self.standard_error


def difference(a: Sequence[Resampled], b: Sequence[Resampled]) -> Difference:
    """The difference of runs that are paired one by one: equal seeds, equal images, equal draws of their groups.

    Raises `ValueError` for runs that were resampled over other groups.
    """
    if len({one.groups for one in (*a, *b)}) > 1:
        raise ValueError("runs that were resampled over other groups cannot be paired")
    observed = np.array([one.observed - other.observed for one, other in zip(a, b, strict=True)])
    drawn = np.mean([one.scores - other.scores for one, other in zip(a, b, strict=True)], axis=0)
    drawn = drawn[~np.isnan(drawn)]
    groups = a[0].groups
    return Difference(
        estimate=float(observed.mean()),
        seed_variance=float(observed.var(ddof=1)) if len(observed) > 1 else math.nan,
        image_variance=float(drawn.var()) * groups / (groups - 1) if groups > 1 and len(drawn) else math.nan,
        seeds=len(observed),
        groups=groups,
    )


def of_one_table(differences: Mapping[str, Difference]) -> dict[str, Difference]:
    """Comparisons that are read together: the variance over seeds of each is raised to at least their median.

    With few seeds, the estimate of a variance is sometimes far too small by chance; among many comparisons, such a one
    would be the most significant. In simulations of the two variances with six equal methods and three seeds, up to
    13 % of the tables have a wrong verdict without this bound, and at most 5 % with it.
    """
    known = [one.seed_variance for one in differences.values() if not math.isnan(one.seed_variance)]
    least = float(np.median(known)) if known else 0.0
    return {
        name: one if math.isnan(one.seed_variance) else replace(one, seed_variance=max(one.seed_variance, least))
        for name, one in differences.items()
    }


def _satterthwaite(of_seeds: float, seeds: int, of_images: float, groups: int) -> float:
    """The degrees of freedom of the sum of two variances."""
    parts = of_seeds**2 / (seeds - 1) + of_images**2 / (groups - 1)
    return (of_seeds + of_images) ** 2 / parts if parts else float(seeds - 1)


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean of independent values with its interval by Student's t; none for a single value."""
    sample = np.asarray(values, float)
    mean = float(sample.mean())
    if len(sample) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Variances:
    """The variance of comparisons in one setting: the means of both parts over the comparisons made so far."""

    of_seeds: float
    of_images: float
    groups: int

    @classmethod
    def of(cls, differences: Sequence[Difference]) -> Variances | None:
        """None where no comparison has both parts."""
        known = [one for one in differences if not one.why_untested]
        if not known:
            return None
        return cls(
            float(np.mean([one.seed_variance for one in known])),
            float(np.mean([one.image_variance for one in known])),
            min(one.groups for one in known),
        )

    def power(self, true: float, seeds: int) -> float:
        """The probability that a true difference is significant, before any correction for several methods."""
        return float(self._powers(true, [seeds])[0])

    def _powers(self, true: float, seeds: Sequence[int]) -> np.ndarray:
        """At each number of seeds, in one call of scipy's distributions: 99 values take three times as long as one."""
        if self.of_seeds == self.of_images == 0:
            return np.ones(len(seeds))
        of_seeds = [self.of_seeds / number for number in seeds]
        pairs = zip(of_seeds, seeds, strict=True)
        freedom = np.array([_satterthwaite(part, number, self.of_images, self.groups) for part, number in pairs])
        shift = abs(true) / np.sqrt(np.array(of_seeds) + self.of_images)
        beyond = stats.t.ppf((1 + LEVEL) / 2, freedom)
        other_tail = np.nan_to_num(stats.nct.cdf(-beyond, freedom, shift))  # NaN where scipy cannot tell it from zero
        return np.asarray(stats.nct.sf(beyond, freedom, shift) + other_tail)

    def seeds_for(self, true: float) -> int | None:
        """The fewest seeds, of at most `MOST_SEEDS`, at which a true difference is significant with probability
        `POWER`; None if there is no such number. With few groups of images, more seeds can have less power.
        """
        seeds = range(2, MOST_SEEDS + 1)
        return next((one for one, power in zip(seeds, self._powers(true, seeds), strict=True) if power >= POWER), None)

    def detectable(self, seeds: int) -> float:
        """The true difference that is significant with probability `POWER`, before any correction for several methods.

        NaN for a power that no difference reaches, as where a variance is NaN.
        """
        error = math.sqrt(self.of_seeds / seeds + self.of_images)
        if not error > 0:
            return error
        most = 100 * error
        if not self.power(most, seeds) >= POWER:
            return math.nan
        return float(optimize.brentq(lambda true: self.power(true, seeds) - POWER, 0, most, xtol=1e-6))

    def needed(self, true: float) -> str:
        """`9 seeds`, or what else is needed to find a true difference."""
        seeds = self.seeds_for(true)
        if seeds is not None:
            return f"{seeds} seeds"
        images_suffice = replace(self, of_seeds=0.0).power(true, MOST_SEEDS) >= POWER
        return f"more than {MOST_SEEDS} seeds" if images_suffice else "more test images"
