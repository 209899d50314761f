"""Selects the samples that a run is trained on and those that it is evaluated on."""

from __future__ import annotations

import hashlib
from collections import Counter

from harness.data.base import Sample, SegmentationDataset
from harness.errors import UserError
from harness.spec import Part


def split_samples(dataset: SegmentationDataset, part: Part, dev_fraction: float) -> tuple[list[Sample], list[Sample]]:
    """The samples for training and the samples for evaluation.

    `report`: all of train, all of test. `dev`: both from train. Groups, in the order of their names' SHA-256, go to the
    dev split until it has at least `dev_fraction` of the samples; one group always remains for training.
    Raises `UserError` for `dev` if train is one group.
    """
    train = list(dataset.samples("train"))
    if part == "report":
        return train, list(dataset.samples("test"))
    sizes = Counter(sample.group for sample in train)
    if len(sizes) < 2:
        problem = f"cannot split off a dev split: train is one group ({train[0].group})"
        raise UserError(problem, field="dataset", value=dataset.name, hint="define smaller groups")
    dev: set[str] = set()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).digest())[:-1]:
        if sum(sizes[other] for other in dev) >= dev_fraction * len(train):
            break
        dev.add(group)
    return (
        [sample for sample in train if sample.group not in dev],
        [sample for sample in train if sample.group in dev],
    )
