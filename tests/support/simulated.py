"""Simulated runs of two methods, of which the true difference is known, and the statistics of the first protocol.

`python -m tests.support.simulated 2000` prints how often two equal methods get a verdict: with few groups of images in
1000 experiments, with twenty in 2000.

An image's pixels of a class are right with a probability whose logit is the sum of the method's level, the difficulty
of the image and of its group, what the method makes of that group and image (which stays from seed to seed), what the
seed makes of the class and of the group, and noise.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np

from harness.runs.difference import (
    LEVEL,
    Difference,
    Interval,
    Resampled,
    difference,
    image_counts,
    resample,
    score,
)

CLASSES = 4


@dataclass(frozen=True)
class World:
    """Standard deviations of logits, and the sizes of an experiment."""

    of_seed: float
    of_image: float
    groups: int = 20
    images_per_group: int = 3
    of_seed_in_group: float = 0.0
    """What a seed makes of a group: an interaction of seeds and images."""
    offset: float = 0.0
    """Of the first method's level."""

    def draw(self, seeds: int, draw: np.random.Generator, methods: int = 2) -> np.ndarray:
        """Counts int64 [methods, seeds, N, 3, K] of new images and new seeds."""
        images = self.groups * self.images_per_group
        pixels = draw.integers(100, 400, (images, CLASSES))
        difficulty = np.repeat(draw.normal(0, 0.5, self.groups), self.images_per_group) + draw.normal(0, 0.4, images)
        shape = (methods, seeds, images, CLASSES)
        logits = np.full(shape, 1.2) + difficulty[:, None] + draw.normal(0, 0.05, shape)
        logits += draw.normal(0, self.of_seed, (methods, seeds, 1, CLASSES))
        if self.of_seed_in_group:
            of_groups = draw.normal(0, self.of_seed_in_group, (methods, seeds, self.groups))
            logits += np.repeat(of_groups, self.images_per_group, axis=2)[..., None]
        own = np.repeat(draw.normal(0, self.of_image, (methods, self.groups)), self.images_per_group, axis=1)
        logits += (own + draw.normal(0, self.of_image, (methods, images)))[:, None, :, None]
        logits[0] += self.offset
        hits = draw.binomial(pixels, 1 / (1 + np.exp(-logits)))
        matrices = np.zeros((*shape, CLASSES), np.int64)
        for label in range(CLASSES):
            matrices[..., label, label] = hits[..., label]
            matrices[..., label, (label + 1) % CLASSES] = pixels[:, label] - hits[..., label]
        return image_counts(matrices)

    def truth(self) -> float:
        """The true difference in mIoU: the mean gain of the first method by its offset, over many images and seeds."""
        gains = []
        for seed in range(40):
            with_offset, without = (
                replace(self, groups=1000, offset=offset).draw(1, np.random.default_rng(seed))[0, 0].sum(0)
                for offset in (self.offset, 0)
            )
            gains.append(score(with_offset) - score(without))
        return float(np.mean(gains))

    def resampled(self, counts: np.ndarray, resamples: int = 200) -> list[list[Resampled]]:
        """Each of `draw`'s runs by method and seed."""
        methods, seeds, _, *rest = counts.shape
        of_groups = counts.reshape(methods, seeds, self.groups, self.images_per_group, *rest).sum(3)
        return [[resample(run, resamples=resamples) for run in runs] for runs in of_groups]

    def compare(self, counts: np.ndarray, resamples: int = 200) -> Difference:
        """The difference of two methods, as a report tests it that has no others."""
        return difference(*self.resampled(counts, resamples))


WORLDS = {
    "seeds": World(of_seed=0.15, of_image=0.0),
    "images": World(of_seed=0.01, of_image=0.15),
    "both": World(of_seed=0.08, of_image=0.12),
    "their interaction": World(of_seed=0.05, of_image=0.08, of_seed_in_group=0.25),
}
"""By what varies most."""


def first_protocol(counts: np.ndarray, resamples: int = 200) -> tuple[Interval, float]:
    """Interval and p as reports had them before: percentiles of a bootstrap over images and seeds, and a permutation
    test over images. Wrong on purpose: the calibration must notice."""
    of_a, of_b = ([resample(run, resamples=resamples) for run in method] for method in counts)
    differences = np.stack([one.scores - other.scores for one, other in zip(of_a, of_b, strict=True)])
    seeds = len(differences)
    drawn = np.random.default_rng(1).multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    low, high = np.percentile((drawn.T * differences).sum(0) / seeds, [2.5, 97.5])
    observed = np.mean([one.observed - other.observed for one, other in zip(of_a, of_b, strict=True)])
    exchanged = np.random.default_rng(0).integers(0, 2, (resamples, counts.shape[2])).astype(float)
    total = np.zeros(resamples)
    for a, b in zip(*counts, strict=True):
        moved = (exchanged @ (b - a).reshape(len(a), -1)).reshape(resamples, *a.shape[1:])
        total += score(a.sum(0) + moved) - score(b.sum(0) - moved)
    as_far = np.abs(total / seeds) >= abs(observed) - 1e-12
    return Interval(float(observed), float(low), float(high)), float((1 + as_far.sum()) / (1 + resamples))


def main(experiments: int) -> None:
    print("| varies most | seeds | 4 groups | 7 groups | 10 groups |\n| --- | ---: | ---: | ---: | ---: |")
    for name, world in WORLDS.items():
        for seeds in (3, 5, 8):
            rates = []
            for groups in (4, 7, 10):
                few, draw = replace(world, groups=groups), np.random.default_rng(seeds)
                wrong = [few.compare(few.draw(seeds, draw)).p < 1 - LEVEL for _ in range(experiments // 2)]
                rates.append(f"{100 * np.mean(wrong):.1f} %")
            print(f"| {name} | {seeds} | {' | '.join(rates)} |", flush=True)
    print("\n| varies most | seeds | today | first protocol |\n| --- | ---: | ---: | ---: |")
    for name, world in WORLDS.items():
        for seeds in (1, 2, 3, 5, 8):
            draw, today, before = np.random.default_rng(seeds), [], []
            for _ in range(experiments):
                counts = world.draw(seeds, draw)
                found = world.compare(counts)
                interval, p = first_protocol(counts)
                today.append(found.why_untested is None and found.p < 1 - LEVEL)
                before.append(p < 1 - LEVEL and (interval.low > 0 or interval.high < 0))
            of_today = f"{100 * np.mean(today):.1f} %" if seeds > 1 else "no verdict"
            print(f"| {name} | {seeds} | {of_today} | {100 * np.mean(before):.1f} % |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
