"""Verdicts are wrong as rarely as their level says: simulated runs of two methods whose true difference is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.runs.difference import LEVEL, difference, of_one_table, score
from reports.analysis.statistics import holm
from tests.support.simulated import WORLDS, World, first_protocol


def false_verdicts(world: World, seeds: int, experiments: int) -> float:
    """The share of experiments with two equal methods in which one is called better."""
    draw = np.random.default_rng(seeds)
    return float(np.mean([world.compare(world.draw(seeds, draw)).p < 1 - LEVEL for _ in range(experiments)]))


def covered(world: World, seeds: int, experiments: int) -> float:
    """The share of experiments whose interval contains the true difference."""
    truth, draw = world.truth(), np.random.default_rng(seeds)
    intervals = [world.compare(world.draw(seeds, draw)).interval for _ in range(experiments)]
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("name", WORLDS)
def test_equal_methods_rarely_get_a_verdict(name: str, seeds: int) -> None:
    assert false_verdicts(WORLDS[name], seeds, 300) <= 0.07


@pytest.mark.exhaustive
@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("name", WORLDS)
def test_equal_methods_rarely_get_a_verdict_in_many_experiments(name: str, seeds: int) -> None:
    world = WORLDS[name]
    least = 0.01 if world.of_seed_in_group else 0.03  # an interaction is a part of both variances, and counts twice
    assert least <= false_verdicts(world, seeds, 4000) <= 0.07


@pytest.mark.parametrize("groups", [4, 7])
@pytest.mark.parametrize("name", WORLDS)
def test_equal_methods_rarely_get_a_verdict_with_few_groups(name: str, groups: int) -> None:
    assert false_verdicts(replace(WORLDS[name], groups=groups), 5, 300) <= 0.1


def wrong_tables(world: World, seeds: int, methods: int, experiments: int) -> tuple[float, float]:
    """The share of experiments with equal methods in which any has a verdict against the first one, and the share in
    which any is called worse than the best."""
    draw, found = np.random.default_rng(seeds), []
    for _ in range(experiments):
        counts = world.draw(seeds, draw, methods)
        best = int(np.argmax(score(counts.sum(2)).mean(1)))
        runs = world.resampled(counts)
        to_first, to_best = (
            of_one_table({str(other): difference(runs[one], runs[other]) for other in range(methods) if other != one})
            for one in (0, best)
        )
        verdicts = holm([one.p for one in to_first.values()]) < 1 - LEVEL
        found.append((verdicts.any(), any(one.differs_among(methods) for one in to_best.values())))
    return tuple(np.mean(found, axis=0))


@pytest.mark.parametrize("name", WORLDS)
def test_table_of_equal_methods_rarely_has_a_verdict(name: str) -> None:
    """The best method is chosen by the scores that are then compared."""
    against_reference, against_best = wrong_tables(WORLDS[name], 3, 6, 100)
    assert against_reference <= 0.07
    assert against_best <= 0.07


@pytest.mark.exhaustive
@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
@pytest.mark.parametrize("name", WORLDS)
def test_table_of_equal_methods_rarely_has_a_verdict_in_many_experiments(name: str, seeds: int) -> None:
    against_reference, against_best = wrong_tables(WORLDS[name], seeds, 6, 1500)
    assert against_reference <= 0.07
    assert against_best <= 0.08


@pytest.mark.parametrize("name", WORLDS)
def test_interval_covers_a_true_difference_of_a_point(name: str) -> None:
    world = one_point(WORLDS[name])
    assert world.truth() == pytest.approx(0.01, abs=0.0003)
    assert covered(world, 5, 300) >= 0.93


@pytest.mark.exhaustive
@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("name", WORLDS)
def test_interval_covers_a_true_difference_of_a_point_in_many_experiments(name: str, seeds: int) -> None:
    assert covered(one_point(WORLDS[name]), seeds, 4000) >= 0.93


def one_point(world: World) -> World:
    return replace(world, offset=0.0455)


@pytest.mark.parametrize("seeds", [3, 5])
def test_statistics_of_the_first_protocol_fail_the_calibration(seeds: int) -> None:
    """What reports did before calls equal methods different far more often: this test can tell."""
    world, draw = WORLDS["both"], np.random.default_rng(seeds)
    found = [first_protocol(world.draw(seeds, draw)) for _ in range(150)]
    wrong = [p < 1 - LEVEL and (interval.low > 0 or interval.high < 0) for interval, p in found]
    assert np.mean(wrong) > 0.1
