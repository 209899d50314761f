"""Every statistic compared with a value derived by hand or a library's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from reports.analysis.statistics import (
    SETTINGS,
    elo,
    holm,
    improvability,
    kendall_tau,
    mean_ranks,
    over_settings,
    pareto_front,
    win_rates,
)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([]).tolist() == []


def test_holm_matches_statsmodels() -> None:
    pvalues = np.random.default_rng(0).random(20) ** 3
    assert holm(list(pvalues)) == pytest.approx(multipletests(pvalues, method="holm")[1])


def test_kendall_tau() -> None:
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx((5 - 1) / 6)
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(kendall_tau([1], [1]))


SCORES = np.array([[0.5, 0.7, 0.6], [0.4, 0.4, 0.1]])
"""Two settings × three methods."""


def test_mean_ranks() -> None:
    assert mean_ranks(SCORES).tolist() == [(3 + 1.5) / 2, (1 + 1.5) / 2, (2 + 3) / 2]


def test_win_rates_count_ties_as_half() -> None:
    assert win_rates(SCORES).tolist() == [(0 + 0 + 0.5 + 1) / 4, (1 + 1 + 0.5 + 1) / 4, (1 + 0 + 0 + 0) / 4]
    assert math.isnan(win_rates(SCORES[:, :1])[0])


def test_improvability_is_the_share_of_the_error_that_the_best_method_saves() -> None:
    expected = [(0.2 / 0.5 + 0) / 2, 0, (0.1 / 0.4 + 0.3 / 0.9) / 2]
    assert improvability(SCORES) == pytest.approx(expected)
    assert improvability(np.ones((1, 2))).tolist() == [0, 0]


def test_elo_of_odds_of_ten_to_one() -> None:
    """With enough comparisons that the prior has no effect: 400 points."""
    scores = np.array([[1.0, 0.0]] * 10_000 + [[0.0, 1.0]] * 1_000)
    assert elo(scores, reference=1) == pytest.approx([1400, 1000], abs=1)


def test_elo_matches_a_logistic_regression() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    scores = np.random.default_rng(0).random((12, 4)) + np.array([0, 0.1, 0.2, 0.3])
    rows, won = [], []
    for setting in scores:
        for i in range(4):
            for j in range(i):
                rows.append(np.eye(4)[i] - np.eye(4)[j])
                won.append(setting[i] > setting[j])
    fitted = sklearn.LogisticRegression(fit_intercept=False, C=1, tol=1e-10, max_iter=1000).fit(rows, won).coef_[0]
    assert elo(scores) == pytest.approx(1000 + 400 / math.log(10) * (fitted - fitted[0]), abs=0.1)


def test_elo_of_a_method_that_always_wins_is_finite() -> None:
    assert np.isfinite(elo(np.array([[0.2, 0.9, 0.1]] * 3))).all()


def test_few_settings_have_no_interval() -> None:
    few, enough = ([[0.2, 0.3 + 0.01 * n] for n in range(count)] for count in (SETTINGS - 1, SETTINGS))
    assert all(math.isnan(interval.low) for interval in over_settings(mean_ranks, np.array(few)))
    assert [tuple(interval) for interval in over_settings(mean_ranks, np.array(enough))] == [(2, 2, 2), (1, 1, 1)]


def test_interval_over_settings_contains_the_estimate() -> None:
    scores = np.random.default_rng(1).random((8, 3))
    for interval in over_settings(improvability, scores):
        assert interval.low < interval.estimate < interval.high


def test_pareto_front() -> None:
    assert pareto_front([0, 1, 2, 2, 3], [0.4, 0.6, 0.5, 0.7, 0.7]).tolist() == [True, True, False, True, False]
    assert pareto_front([1, 1], [0.5, 0.5]).tolist() == [True, True]
    assert pareto_front([1, math.nan], [0.5, 0.9]).tolist() == [True, False]
