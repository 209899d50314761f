"""Which samples a run trains on and which it evaluates."""

from __future__ import annotations

import hashlib
from collections import Counter

from harness.data.base import Sample, SegmentationDataset
from harness.errors import UserError
from harness.spec import Part


def split_samples(dataset: SegmentationDataset, part: Part, dev_fraction: float) -> tuple[list[Sample], list[Sample]]:
    """The samples to fit on and those to evaluate on.

    `report`: all of train, all of test. `dev`: train alone; its groups, in the order of their names' SHA-256,
    are held out until at least `dev_fraction` of the samples are, but one group always stays.
    Raises `UserError` for `dev` where train is one group.
    """
    train = list(dataset.samples("train"))
    if part == "report":
        return train, list(dataset.samples("test"))
    sizes = Counter(sample.group for sample in train)
    if len(sizes) < 2:
        problem = f"no dev part can be held out of train, which is one group ({train[0].group})"
        raise UserError(problem, field="dataset", value=dataset.name, hint="define smaller groups")
    held: set[str] = set()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).digest())[:-1]:
        if sum(sizes[other] for other in held) >= dev_fraction * len(train):
            break
        held.add(group)
    return (
        [sample for sample in train if sample.group not in held],
        [sample for sample in train if sample.group in held],
    )
