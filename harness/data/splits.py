"""Selects the samples that a run is trained on and those that it is evaluated on.

| part | trained on | evaluated on |
| --- | --- | --- |
| `report` | train | test |
| `dev`, of a dataset with a dev split | train | dev |
| `dev`, of a dataset without | train without the groups held out | the groups held out |

A dev split is never trained on, not even for `report`: train on train, select on dev, report on test.

With `train_fraction` a run trains on a share of these images, which its seed draws.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from harness.data.base import Sample, SegmentationDataset
from harness.errors import UserError
from harness.spec import Part
from harness.util.seeds import derive


def split_samples(dataset: SegmentationDataset, part: Part, dev_fraction: float) -> tuple[list[Sample], list[Sample]]:
    """The samples for training and the samples for evaluation.

    Where dev is held out of train: groups, in the order of their names' SHA-256, go to dev until it has at least
    `dev_fraction` of the samples; one group always remains for training.
    Raises `UserError` if dev must be held out and train is one group.
    """
    train = list(dataset.samples("train"))
    own = list(dataset.samples("test" if part == "report" else "dev"))
    if own:
        return train, own
    sizes = Counter(sample.group for sample in train)
    if len(sizes) < 2:
        problem = f"dev cannot be held out of train, which is one group ({train[0].group})"
        hint = "write a `group` pattern of smaller groups, or give it a dev split"
        raise UserError(problem, field="dataset", value=dataset.name, hint=hint).at(dataset.description)
    dev = held_out_groups(sizes, dev_fraction)
    return (
        [sample for sample in train if sample.group not in dev],
        [sample for sample in train if sample.group in dev],
    )


def held_out_groups(sizes: Mapping[str, int], fraction: float) -> set[str]:
    """Groups with at least `fraction` of the samples, in the order of their names' SHA-256; one always remains.

    `sizes` are samples per group. Adding a group to a dataset leaves most of the choice as it was.
    """
    held: set[str] = set()
    samples, wanted = 0, fraction * sum(sizes.values())
    order = sorted(sizes, key=lambda group: hashlib.sha256(group.encode(errors="surrogateescape")).digest())
    for group in order[:-1]:
        if samples >= wanted:
            break
        held.add(group)
        samples += sizes[group]
    return held


def drawn(samples: Sequence[Sample], fraction: float, seed: int) -> list[Sample]:
    """At least `fraction` of the samples, in their order; at one seed, a smaller fraction's are among a larger one's.

    Whether a sample is drawn before another depends on the seed and their names alone.
    """
    if fraction == 1:
        return list(samples)
    order = sorted(samples, key=lambda sample: derive(seed, "drawn", sample.name))
    count = math.ceil(round(fraction * len(samples), 6))  # .1 of 30 is a little above 3 in floating point
    chosen = {sample.name for sample in order[:count]}
    return [sample for sample in samples if sample.name in chosen]
