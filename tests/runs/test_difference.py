"""The difference of two methods, compared with values derived by hand and with scipy's."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from harness.runs.difference import (
    POWER,
    Difference,
    Variances,
    class_scores,
    class_shares,
    difference,
    grouped,
    image_counts,
    mean_interval,
    of_one_table,
    resample,
    score,
)
from harness.runs.metrics import metrics


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


@pytest.mark.parametrize("name", ["miou", "macc", "aacc", "mdice"])
def test_shares_of_classes_add_up_to_the_score(name: str) -> None:
    counts = image_counts(drawn(3)).sum(0)
    counts[:, 1] = 0
    assert class_shares(counts, name).sum() == pytest.approx(float(score(counts, name)))
    assert class_shares(counts, name)[1] == 0


def test_class_scores_are_the_ious() -> None:
    matrix = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert class_scores(image_counts(matrix), "miou") == pytest.approx([6 / 9, 3 / 6, math.nan], nan_ok=True)


def test_counts_are_summed_over_groups() -> None:
    counts = image_counts(drawn(1, images=5))
    sums = grouped(counts, ["b", "a", "b", "c", "a"])
    np.testing.assert_array_equal(sums, [counts[1] + counts[4], counts[0] + counts[2], counts[3]])
    assert grouped(counts, None) is counts
    assert np.array_equal(grouped(counts[:2], ["b", "a"]), counts[:2][::-1])  # in the order of their names


def of(a: np.ndarray, b: np.ndarray, metric: str | int = "miou", resamples: int = 4000) -> Difference:
    """Counts [S, G, 3, K] of two methods."""
    return difference(*([resample(run, metric, resamples) for run in runs] for runs in (a, b)))


def accuracies(*shares: float) -> Difference:
    """One image a group; the first method gets this share more right than the second, which gets half."""
    a, b = binary(*(5 + round(10 * share) for share in shares)), binary(*[5] * len(shares))
    return of(np.concatenate([a, a]), np.concatenate([b, b]), metric=0)


def test_image_variance_is_that_of_a_mean() -> None:
    """Equal images: the score is the mean over them, whose variance is known."""
    found = accuracies(0.1, 0.3, 0.2, 0.4, 0.0)
    sample = np.array([0.1, 0.3, 0.2, 0.4, 0.0])
    assert found.estimate == pytest.approx(0.2)
    assert found.image_variance == pytest.approx(sample.var(ddof=1) / 5, rel=0.05)
    assert found.seed_variance == 0


def test_with_images_alone_p_is_that_of_a_t_test() -> None:
    found = accuracies(0.1, 0.3, 0.2, 0.4, 0.0)
    assert found.degrees_of_freedom == pytest.approx(4)
    assert found.p == pytest.approx(stats.ttest_1samp([0.1, 0.3, 0.2, 0.4, 0.0], 0).pvalue, rel=0.1)


def test_with_seeds_alone_interval_and_p_are_those_of_a_t_test() -> None:
    """All images of a seed are alike, so that groups add nothing."""
    hits = [7, 8, 6, 9]
    a, b = (np.concatenate([binary(*[hit] * 6) for hit in side]) for side in (hits, [5, 5, 6, 6]))
    found, expected = of(a, b, metric=0), stats.ttest_1samp([0.2, 0.3, 0.0, 0.3], 0)
    assert found.image_variance < 1e-30
    assert (found.seeds, found.groups, found.degrees_of_freedom) == (4, 6, pytest.approx(3))
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert found.interval == pytest.approx((0.2, interval.low, interval.high))


def test_degrees_of_freedom_are_welch_s_for_two_independent_parts() -> None:
    """Satterthwaite's formula is the one of Welch's t test, of samples with as many seeds and groups."""
    x, y = np.array([1.0, 2.0, 4.0]), np.array([0.0, 3.0, 1.0, 2.0, 7.0])
    welch = stats.ttest_ind(x, y, equal_var=False)
    found = Difference(x.mean() - y.mean(), float(x.var(ddof=1)), float(y.var(ddof=1) / 5), seeds=3, groups=5)
    assert found.degrees_of_freedom == pytest.approx(welch.df)
    assert found.p == pytest.approx(welch.pvalue)


def test_pairing_removes_what_images_have_in_common() -> None:
    """Images differ much, methods by a pixel on each: only a paired comparison can see it."""
    hits = np.random.default_rng(0).integers(1, 9, 40)
    pair = [np.concatenate([binary(*side)] * 2) for side in (hits + 1, hits)]
    assert of(pair[0], pair[1], metric=0).interval == pytest.approx((0.1, 0.1, 0.1))


def test_groups_that_resemble_each_other_inside_widen_the_interval() -> None:
    """Ten copies of each image are no more evidence than one."""
    hits = np.random.default_rng(0).integers(1, 9, 12)
    a, b = (np.repeat(binary(*side), 10, axis=1) for side in (hits + np.arange(12) % 3 - 1, hits))
    names = [str(image // 10) for image in range(120)]
    apart = of(np.concatenate([a, a]), np.concatenate([b, b]), metric=0)
    a, b = (grouped(side[0], names)[None] for side in (a, b))
    together = of(np.concatenate([a, a]), np.concatenate([b, b]), metric=0)
    assert together.image_variance > 8 * apart.image_variance


def test_equal_methods_differ_by_nothing() -> None:
    counts = np.stack([image_counts(drawn(1))] * 2)
    found = of(counts, counts)
    assert (found.interval, found.p) == ((0, 0, 0), 1)
    assert not found.differs_among(2)


def test_one_seed_and_one_group_are_no_test() -> None:
    a, b = image_counts(drawn(1))[None], image_counts(drawn(2))[None]
    one_seed = of(a, b)
    assert one_seed.why_untested == "one seed"
    assert math.isnan(one_seed.p) and math.isnan(one_seed.interval.low) and not one_seed.differs_among(2)
    one_group = of(*(np.concatenate([side.sum(1, keepdims=True)] * 2) for side in (a, b)))
    assert one_group.why_untested == "one group of images"


def test_difference_of_two_methods_among_many_needs_more() -> None:
    """The thresholds lie between those of one comparison and those of Bonferroni for all pairs."""
    freedom, pairs = 9.0, math.comb(8, 2)

    def at(t: float) -> Difference:
        return Difference(t, 10.0, 0.0, seeds=10, groups=2)

    single, bonferroni = (float(stats.t.ppf(1 - 0.025 / n, freedom)) for n in (1, pairs))
    tukey = float(stats.studentized_range.ppf(0.95, 8, freedom)) / math.sqrt(2)
    assert single < tukey < bonferroni
    assert at(single * 1.01).differs_among(2) and not at(single * 0.99).differs_among(2)
    assert at(tukey * 1.01).differs_among(8) and not at(tukey * 0.99).differs_among(8)
    assert at(bonferroni * 1.01).differs_among(8)


def test_mean_interval_is_scipy_s() -> None:
    values = [0.3, 0.5, 0.4, 0.7]
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert mean_interval(values) == pytest.approx((0.475, expected.low, expected.high))
    assert math.isnan(mean_interval([0.3]).low)


def test_power_is_that_of_a_t_test() -> None:
    from statsmodels.stats.power import TTestPower

    seen = Variances(of_seeds=4.0, of_images=0.0, groups=20)
    assert seen.power(1.0, seeds=12) == pytest.approx(TTestPower().power(0.5, nobs=12, alpha=0.05))
    needed = math.ceil(TTestPower().solve_power(0.5, power=0.8, alpha=0.05))
    assert seen.seeds_for(1.0) == needed


def test_no_number_of_seeds_replaces_test_images() -> None:
    few_images = Variances(of_seeds=1e-6, of_images=1e-4, groups=20)
    assert (few_images.seeds_for(0.01), few_images.needed(0.01)) == (None, "more test images")
    noisy = Variances(of_seeds=0.01, of_images=1e-8, groups=20)
    assert (noisy.seeds_for(0.01), noisy.needed(0.01)) == (None, "more than 100 seeds")
    assert Variances(of_seeds=1e-6, of_images=1e-6, groups=20).seeds_for(0.01) == 2


def test_more_seeds_can_have_less_power() -> None:
    """With two groups of images, the degrees of freedom fall to one as the seeds' part of the variance vanishes."""
    seen = Variances(of_seeds=0.5 * 0.000744**2, of_images=0.000744**2, groups=2)
    assert seen.power(0.01, 100) < seen.power(0.01, 12) < 0.8 < seen.power(0.01, 2)
    assert seen.seeds_for(0.01) == 2


def test_runs_of_other_groups_cannot_be_paired() -> None:
    counts = image_counts(drawn(1))
    with pytest.raises(ValueError, match="other groups"):
        difference([resample(counts)], [resample(counts[:10])])


def test_variance_over_seeds_is_no_less_than_the_median_of_its_table() -> None:
    variances = {"a": 1.0, "b": 4.0, "c": 2.0, "d": math.nan}
    table = {name: Difference(0.5, variance, 0.1, 3, 9) for name, variance in variances.items()}
    found = {name: one.seed_variance for name, one in of_one_table(table).items()}
    assert found == pytest.approx({"a": 2.0, "b": 4.0, "c": 2.0, "d": math.nan}, nan_ok=True)
    assert of_one_table({"b": table["b"]}) == {"b": table["b"]}
    assert of_one_table({}) == {}


def test_variances_are_means_over_the_comparisons_that_have_them() -> None:
    found = [Difference(0.0, 1.0, 2.0, 3, 9), Difference(0.0, 3.0, 4.0, 3, 8), Difference(0.0, math.nan, 1.0, 1, 7)]
    assert Variances.of(found) == Variances(2.0, 3.0, 8)
    assert Variances.of(found[2:]) is None


def test_detectable_difference_is_found_with_the_power_that_it_states() -> None:
    variances = Variances(of_seeds=0.01**2, of_images=0.003**2, groups=20)
    found = variances.detectable(5)
    assert 0.005 < found < 0.05 and variances.power(found, 5) == pytest.approx(POWER, abs=1e-3)
    assert variances.detectable(10) < found
    one = Difference(0.0, 0.01**2, 0.003**2, seeds=5, groups=20)
    assert one.detectable == found
    assert np.isnan(replace(one, seeds=1, seed_variance=float("nan")).detectable)
