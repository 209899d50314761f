"""How many seeds a study needs, estimated from the variances of its finished runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from harness.errors import UserError
from harness.runs.difference import (
    POWER,
    Difference,
    Resampled,
    Variances,
    difference,
    grouped,
    image_counts,
    of_one_table,
    resample,
)
from harness.runs.folder import RunFolder
from harness.runs.metrics import read_confusions
from harness.runs.state import RunState
from harness.runs.store import RunStore
from studies.plan import Plan, rows_of
from studies.tune import HEAD_METHOD

RESAMPLES = 500
"""Fewer than a report draws: enough for a whole number of seeds."""


@dataclass(frozen=True)
class Needed:
    """What one setting needs to find a true difference with probability `POWER`."""

    setting: str
    seeds: int
    """The most seeds of a finished comparison that this rests on."""
    for_a_point: str
    """As `Variances.needed`."""
    for_half_a_point: str

    def __str__(self) -> str:
        return (
            f"{self.setting}: to find a true difference with probability {POWER:g}, by the variances of the "
            f"{self.seeds} seeds that are done: 1 point: {self.for_a_point}; 0.5 points: {self.for_half_a_point}"
        )


def seeds_needed(plan: Plan, store: RunStore) -> Iterator[Needed]:
    """For every setting with two methods that are done on two seeds; others say nothing about the variance."""
    settings: dict[tuple[str, str, str], dict[str, dict[int, str]]] = {}
    for row in rows_of(plan):
        done = {cell.request.seed: cell.fingerprint for cell in row["cells"] if cell.state is RunState.DONE}
        settings.setdefault((row["backbone"], row["dataset"], row["head"]), {})[row["label"]] = done
    for names, runs in settings.items():
        reference = HEAD_METHOD if len(runs.get(HEAD_METHOD, ())) > 1 else max(runs, key=lambda label: len(runs[label]))
        seen, seeds = _variances(runs, reference, store)
        if seen is not None:
            yield Needed(", ".join(names), seeds, seen.needed(0.01), seen.needed(0.005))


def _variances(runs: Mapping[str, Mapping[int, str]], reference: str, store: RunStore) -> tuple[Variances | None, int]:
    """The variances of the differences of all labels to the reference, and the most seeds that one of them has."""
    read: dict[str, tuple[list[str], Resampled] | None] = {}

    def resampled(fingerprint: str) -> tuple[list[str], Resampled] | None:
        if fingerprint not in read:
            read[fingerprint] = _resample(store, store.by_fingerprint(fingerprint))
        return read[fingerprint]

    differences: dict[str, Difference] = {}
    for label in runs.keys() - {reference}:
        shared = sorted(runs[label].keys() & runs[reference].keys())
        pairs = [(resampled(runs[label][seed]), resampled(runs[reference][seed])) for seed in shared]
        readable = [
            (own[1], base[1])
            for own, base in pairs
            if own and base and own[0] == base[0] and own[1].groups == base[1].groups
        ]
        if len(readable) > 1:
            differences[label] = difference(*(list(side) for side in zip(*readable, strict=True)))
    found = list(of_one_table(differences).values())
    return Variances.of(found), max((one.seeds for one in found), default=0)


def _resample(store: RunStore, run: RunFolder) -> tuple[list[str], Resampled] | None:
    """The images' names, and the run resampled. None where its files cannot be used; a report says why."""
    _, result = store.read(run)
    if result is None:
        return None
    try:
        stored = read_confusions(run.confusions_path, result.files, len(result.metrics.per_class))
    except UserError:
        return None
    return stored.names, resample(grouped(image_counts(stored.matrices), stored.groups), resamples=RESAMPLES)
