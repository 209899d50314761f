"""Every statistic compared with a value derived by hand or a library's."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from harness.runs.metrics import metrics
from reports.analysis.statistics import (
    holm,
    image_counts,
    iqm,
    iqm_interval,
    kendall_tau,
    paired_bootstrap,
    paired_permutation_test,
    pareto_front,
    probability_of_improvement,
    ranks,
    score,
)


def drawn(seed: int, images: int = 20, classes: int = 3, hit: int = 60) -> np.ndarray:
    """Confusion matrices [N, K, K] whose labels are the same for every seed."""
    truth = np.random.default_rng(99).integers(80, 120, (images, classes))
    hits = np.random.default_rng(seed).integers(hit - 15, hit + 15, (images, classes))
    matrices = np.zeros((images, classes, classes), np.int64)
    for label in range(classes):
        matrices[:, label, label] = hits[:, label]
        matrices[:, label, (label + 1) % classes] = truth[:, label] - hits[:, label]
    return matrices


def binary(*hits: int) -> np.ndarray:
    """Counts [1, N, 3, 2] of images with ten pixels of class 0, of which `hits` are right and the others class 1."""
    matrices = np.array([[[hit, 10 - hit], [0, 0]] for hit in hits])
    return image_counts(matrices)[None]


@pytest.mark.parametrize("name", ["miou", "macc", "aacc", "mdice"])
def test_scores_of_counts_match_those_of_matrices(name: str) -> None:
    matrices = drawn(0)
    assert score(image_counts(matrices).sum(0), name) == pytest.approx(getattr(metrics(matrices.sum(0)), name))


def test_absent_class_is_not_in_the_mean() -> None:
    matrix = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert score(image_counts(matrix)) == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert score(image_counts(matrix), 1) == pytest.approx(3 / 6)
    assert math.isnan(score(image_counts(matrix), 2))


def test_bootstrap_interval_over_two_images() -> None:
    """Both images are the first, or the second, in a quarter of the resamples each."""
    a, b = binary(9, 6), binary(7, 5)
    interval = paired_bootstrap(a, b, metric=0)
    assert interval == pytest.approx((15 / 20 - 12 / 20, 6 / 10 - 5 / 10, 9 / 10 - 7 / 10))


def test_bootstrap_interval_over_two_seeds() -> None:
    a, b = np.concatenate([binary(9, 9), binary(6, 6)]), np.concatenate([binary(5, 5), binary(5, 5)])
    assert paired_bootstrap(a, b, metric=0) == pytest.approx((0.25, 0.1, 0.4))


def test_bootstrap_interval_of_equal_runs_is_zero() -> None:
    counts = image_counts(drawn(1))[None]
    interval = paired_bootstrap(counts, counts)
    assert interval == (0, 0, 0)
    assert interval.contains_zero


def test_bootstrap_matches_scipy() -> None:
    a, b = image_counts(drawn(1)), image_counts(drawn(2, hit=64))

    def difference(chosen: np.ndarray) -> float:
        return float(score(a[chosen].sum(0)) - score(b[chosen].sum(0)))

    theirs = stats.bootstrap(
        (np.arange(len(a)),), difference, n_resamples=4000, vectorized=False, method="percentile", rng=0
    ).confidence_interval
    ours = paired_bootstrap(a[None], b[None], resamples=4000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)
    assert ours.estimate == pytest.approx(difference(np.arange(len(a))))


def test_pairing_narrows_the_interval() -> None:
    """Images differ much, methods by a pixel on each: only a paired interval can see it."""
    hits = np.random.default_rng(0).integers(1, 9, 40)
    interval = paired_bootstrap(binary(*(hits + 1)), binary(*hits), metric=0)
    assert interval == pytest.approx((0.1, 0.1, 0.1))


def test_permutation_test_of_three_images() -> None:
    """None or all three exchanged: 2 of the 8 ways."""
    assert paired_permutation_test(binary(9, 9, 9), binary(5, 5, 5), metric=0) == pytest.approx(2 / 8, abs=0.03)


def test_permutation_test_matches_scipy() -> None:
    a, b = image_counts(drawn(1, images=8)), image_counts(drawn(2, images=8, hit=66))
    both = np.concatenate([a, b])

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return score(both[x.astype(int)].sum(axis - 2)) - score(both[y.astype(int)].sum(axis - 2))

    exact = stats.permutation_test(
        (np.arange(8), np.arange(8, 16)), difference, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert paired_permutation_test(a[None], b[None], resamples=20_000) == pytest.approx(exact.pvalue, abs=0.01)


def test_permutation_test_of_equal_runs_is_one() -> None:
    counts = image_counts(drawn(1))[None]
    assert paired_permutation_test(counts, counts) == 1


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([]).tolist() == []


def test_holm_matches_statsmodels() -> None:
    pvalues = np.random.default_rng(0).random(20) ** 3
    assert holm(list(pvalues)) == pytest.approx(multipletests(pvalues, method="holm")[1])


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert iqm([100, 1, 2, 3, 4, 5, 6, -100]) == (2 + 3 + 4 + 5) / 4
    assert iqm([1, 2, 6]) == 3


def test_iqm_of_settings_with_different_numbers_of_seeds() -> None:
    scores = [[1.0, 2.0, 3.0], [4.0], [5.0, 6.0, 7.0, 8.0]]
    interval = iqm_interval(scores)
    assert interval.estimate == 4.5
    assert 1 <= interval.low < 4.5 < interval.high <= 8


def test_iqm_interval_of_two_settings() -> None:
    """Both draws are the lower setting, or the higher, in a quarter of the resamples each."""
    assert iqm_interval([[0.2], [0.6]]) == pytest.approx((0.4, 0.2, 0.6))


def test_single_run_has_no_interval() -> None:
    assert math.isnan(iqm_interval([[0.5]]).low)
    assert math.isnan(probability_of_improvement([[0.5]], [[0.4]]).low)


def test_probability_of_improvement_matches_mann_whitney() -> None:
    x, y = [[3.0, 1.0, 2.0], [5.0, 5.0]], [[2.0, 0.0], [5.0, 4.0, 6.0]]
    theirs = [
        stats.mannwhitneyu(one, other).statistic / (len(one) * len(other)) for one, other in zip(x, y, strict=True)
    ]
    found = probability_of_improvement(x, y)
    assert found.estimate == pytest.approx(np.mean(theirs)) == pytest.approx((4.5 / 6 + 3 / 6) / 2)
    assert found.low < found.estimate < found.high


def test_probability_of_improvement_is_one_for_the_best_method() -> None:
    assert probability_of_improvement([[2, 3], [5, 6]], [[1, 0], [4, 4]]) == (1, 1, 1)


def test_kendall_tau() -> None:
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx((5 - 1) / 6)
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(kendall_tau([1], [1]))


def test_ranks() -> None:
    scores = pd.DataFrame({"a": [0.5, 0.4], "b": [0.7, 0.4], "c": [0.6, 0.1]})
    assert ranks(scores).to_numpy().tolist() == [[3, 1, 2], [1.5, 1.5, 3]]


def test_pareto_front() -> None:
    assert pareto_front([0, 1, 2, 2, 3], [0.4, 0.6, 0.5, 0.7, 0.7]).tolist() == [True, True, False, True, False]
    assert pareto_front([1, 1], [0.5, 0.5]).tolist() == [True, True]
    assert pareto_front([1, math.nan], [0.5, 0.9]).tolist() == [True, False]
