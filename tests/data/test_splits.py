"""Which share of the images a run with a `train_fraction` is trained on."""

from __future__ import annotations

import pytest

from harness.data.base import Sample
from harness.data.splits import drawn

SAMPLES = [Sample(f"train/{number:03d}", f"g{number % 4}", None) for number in range(30)]


def names(fraction: float, seed: int = 0) -> list[str]:
    return [sample.name for sample in drawn(SAMPLES, fraction, seed)]


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 3), (0.11, 4), (0.001, 1), (0.5, 15), (0.999, 30), (1, 30)])
def test_at_least_the_fraction_is_drawn(fraction: float, count: int) -> None:
    assert len(names(fraction)) == count


def test_a_smaller_fraction_is_a_part_of_a_larger_one() -> None:
    assert set(names(0.1)) < set(names(0.3)) < set(names(0.7))


def test_seeds_draw_different_images_and_keep_their_order() -> None:
    assert names(0.5, 0) != names(0.5, 1)
    assert names(0.5, 1) == sorted(names(0.5, 1))


def test_an_image_more_leaves_the_draw_as_it_was() -> None:
    fewer = {sample.name for sample in drawn(SAMPLES[:-1], 10 / 29, 3)}
    more = {sample.name for sample in drawn(SAMPLES, 10 / 30, 3)}
    assert len(fewer) == len(more) == 10 and len(fewer & more) >= 9


def test_name_that_is_not_utf_8_can_be_drawn() -> None:
    assert len(drawn([Sample(b"\xff".decode(errors="surrogateescape"), "g", None), *SAMPLES[:3]], 0.5, 0)) == 2
