"""Checks before training: whether a budget fits a dataset, and whether the dataset's splits are independent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from harness.data.base import SPLITS, Sample, SegmentationDataset
from harness.data.splits import split_samples
from harness.errors import UserError
from harness.spec import Budget, Part
from harness.util.text import counted, list_some

LEAST_COVERAGE = 0.5
"""The least share of each side of an image that a crop should cover. With smaller crops, methods that train much of the
backbone lose more than those that train little, which can reverse their order."""

HELD_OUT = "held out of train by group"


def check_fit(dataset: SegmentationDataset, budget: Budget, part: Part) -> None:
    """Raises `UserError` if windows are larger than every image, or if dev must be held out and cannot be."""
    largest = dataset.working_sizes.largest
    if budget.evaluation == "slide" and any(c > side for c, side in zip(budget.crop, largest, strict=True)):
        problem = (
            f"the windows of `evaluation: slide`, {list(budget.crop)}, are larger than the images of {dataset.name}, "
            f"at most {list(largest)} at working size"
        )
        hint = "use a smaller crop, or `evaluation: whole`"
        raise UserError(problem, field="budget", value=budget.name, hint=hint)
    if dataset.thinnest is not None and dataset.thinnest[0] * budget.resize[0] < 1:
        side, name = dataset.thinnest
        problem = (
            f"{name} of {dataset.name} is {side} pixel thin at working size, and vanishes at {budget.resize[0]:g} of it"
        )
        raise UserError(
            problem, field="budget", value=budget.name, hint="leave the image out, or use a higher `resize`"
        )
    if part == "dev":
        split_samples(dataset, part, budget.dev_fraction)


def describe_parts(dataset: SegmentationDataset, dev_fraction: float, train_fraction: float = 1.0) -> str:
    """One line: the images and groups of train, dev and test, and where dev comes from."""
    train, test = dataset.samples("train"), dataset.samples("test")
    own = dataset.samples("dev")
    if own:
        dev = _size(own)
    else:
        try:
            dev = f"{_size(split_samples(dataset, 'dev', dev_fraction)[1])} {HELD_OUT}"
        except UserError:
            dev = "none, since train is one group"
    held_out = f" {HELD_OUT}" if dataset.test_is_held_out else ""
    share = ""
    if train_fraction < 1:
        share = f", of which each seed draws {100 * train_fraction:g} % of the images"
    return f"{dataset.name}: train {_size(train)}{share}; dev {dev}; test {_size(test)}{held_out}"


def warnings(dataset: SegmentationDataset, budget: Budget) -> list[str]:
    """What makes scores on this dataset under this budget misleading; one line each."""
    return [*file_warnings(dataset), *_small_crop(dataset, budget)]


def file_warnings(dataset: SegmentationDataset) -> list[str]:
    """What is odd about the dataset itself, under any budget; one line each."""
    oddities = [f"{dataset.name}: {text}" for text in dataset.oddities]
    return [*oddities, *_copied_images(dataset), *_shared_groups(dataset), *_large_test(dataset)]


def _copied_images(dataset: SegmentationDataset) -> list[str]:
    return [
        f"{dataset.name}: {found.first} and {found.second} share {counted(found.images, 'equal image file')}, such as "
        f"{' and '.join(found.example)}"
        for found in dataset.copies
    ]


def _large_test(dataset: SegmentationDataset) -> list[str]:
    """Where groups are of very unequal size, whole groups can hold far more than the requested share."""
    train, test = dataset.samples("train"), dataset.samples("test")
    if not dataset.test_is_held_out or len(test) <= len(train):
        return []
    return [
        f"{dataset.name}: the test split that is held out by group has {len(test)} of {len(train) + len(test)} images, "
        "since groups are of very unequal size; write a `group` pattern of smaller groups, or lists of images"
    ]


def _shared_groups(dataset: SegmentationDataset) -> list[str]:
    lines = []
    counts = {split: Counter(sample.group for sample in dataset.samples(split)) for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        shared = sorted(counts[first].keys() & counts[second].keys())
        if shared:
            images = sum(counts[second][group] for group in shared)
            lines.append(
                f"{dataset.name}: {first} and {second} share {counted(len(shared), 'group')} ({list_some(shared)}): "
                f"{images} of {counts[second].total()} images of {second} may resemble images of {first}"
            )
    return lines


def _small_crop(dataset: SegmentationDataset, budget: Budget) -> list[str]:
    sizes = dataset.working_sizes
    median = " (median)" if sizes.median != sizes.largest else ""
    covered = [
        f"{100 * crop / side:.0f} % of the images' {name}, {crop} of {side} pixels{median}"
        for name, crop, side in zip(("height", "width"), budget.crop, sizes.median, strict=True)
        if crop < LEAST_COVERAGE * side
    ]
    if not covered:
        return []
    return [
        f"{dataset.name}: the crop {list(budget.crop)} covers {' and '.join(covered)}, at working size; "
        f"use one closer to {list(sizes.median)}, or a smaller `scale`"
    ]


def _size(samples: Sequence[Sample]) -> str:
    return f"{counted(len(samples), 'image')} in {counted(len({sample.group for sample in samples}), 'group')}"
