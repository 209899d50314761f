"""How many seeds a study needs, by the variances that its finished runs have shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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
from harness.runs.metrics import load_confusions
from harness.runs.state import RunState
from harness.runs.store import RunStore
from studies.plan import Plan, rows_of
from studies.tune import HEAD_METHOD

RESAMPLES = 500
"""Fewer than a report draws: a number of seeds is no finer."""


@dataclass(frozen=True)
class Needed:
    """The seeds that one setting needs to find a true difference with probability `POWER`; None: more images."""

    setting: str
    seeds: int
    """Of the finished runs that this rests on."""
    for_a_point: int | None
    for_half_a_point: int | None

    def __str__(self) -> str:
        points = (("1 point", self.for_a_point), ("0.5 points", self.for_half_a_point))
        found = [f"{name}: {f'{count} seeds' if count else 'more test images'}" for name, count in points]
        return (
            f"{self.setting}: to find a true difference with probability {POWER:g}, by the variances of the "
            f"{self.seeds} seeds that are done: {'; '.join(found)}"
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
            yield Needed(", ".join(names), seeds, seen.seeds_for(0.01), seen.seeds_for(0.005))


def _variances(runs: Mapping[str, Mapping[int, str]], reference: str, store: RunStore) -> tuple[Variances | None, int]:
    """Of the differences of all labels to the reference, and the most seeds that one of them has."""
    read: dict[str, Resampled | None] = {}

    def resampled(fingerprint: str) -> Resampled | None:
        if fingerprint not in read:
            read[fingerprint] = _resample(store.by_fingerprint(fingerprint).confusions_path)
        return read[fingerprint]

    differences: dict[str, Difference] = {}
    for label in runs.keys() - {reference}:
        shared = sorted(runs[label].keys() & runs[reference].keys())
        pairs = [(resampled(runs[label][seed]), resampled(runs[reference][seed])) for seed in shared]
        readable = [(own, base) for own, base in pairs if own and base and own.groups == base.groups]
        if len(readable) > 1:
            differences[label] = difference(*(list(side) for side in zip(*readable, strict=True)))
    found = list(of_one_table(differences).values())
    return Variances.of(found), max((one.seeds for one in found), default=0)


def _resample(path: Path) -> Resampled | None:
    """None where the file cannot be read; a report says why."""
    try:
        stored = load_confusions(path)
    except Exception:  # numpy and zipfile raise many kinds of errors for a damaged file
        return None
    return resample(grouped(image_counts(stored.matrices), stored.groups), resamples=RESAMPLES)
