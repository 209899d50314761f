"""How often two equal methods get a verdict on real runs: one method, whose seeds are split at random into two sides.

`python -m reports.analysis.equal_methods FINGERPRINT --runs runs` takes a run and all that differ from it only in their
seed. Each deal draws 2 S of these seeds at random, pairs them, and compares the two sides as a report compares two
methods. Every verdict is wrong; 5 % are nominal. Deals share runs, so a rate has a larger error than that of as many
independent experiments: the more seeds, the better.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.runs.difference import LEVEL, Resampled, difference, grouped, image_counts, resample
from harness.runs.metrics import read_confusions
from harness.runs.store import RunStore

DEALS = 2000
SEEDS = (2, 3, 5, 8)


def runs_of_other_seeds(store: RunStore, fingerprint: str) -> list[Resampled]:
    """The run and the finished ones of its other seeds, resampled over their groups of images.

    Raises `UserError` if there is no such run, or if the files of one are damaged.
    """
    wanted = store.by_fingerprint(fingerprint).spec().model_copy(update={"seed": 0})
    found = []
    for run in store:
        _, result = store.read(run)
        if result is not None and run.spec().model_copy(update={"seed": 0}) == wanted:
            stored = read_confusions(run.confusions_path, result.files, len(result.metrics.per_class))
            found.append(resample(grouped(image_counts(stored.matrices), stored.groups)))
    return found


def wrong_verdicts(runs: Sequence[Resampled], seeds: int, deals: int = DEALS) -> tuple[float, float]:
    """The share of deals with a verdict, and the mean half width of the intervals of a difference."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(deals):
        dealt = [runs[index] for index in draw.permutation(len(runs))[: 2 * seeds]]
        found.append(difference(dealt[:seeds], dealt[seeds:]))
    wrong = float(np.mean([one.p < 1 - LEVEL for one in found]))
    return wrong, float(np.mean([one.interval.high - one.estimate for one in found]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reports.analysis.equal_methods", description=__doc__)
    parser.add_argument("fingerprint", help="of a finished run")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of the run folders (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        runs = runs_of_other_seeds(RunStore(options.runs), options.fingerprint)
        if len(runs) < 2 * min(SEEDS):
            raise UserError(f"{options.fingerprint} has {len(runs)} finished seeds; run at least {2 * min(SEEDS)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores = np.array([run.observed for run in runs])
    print(
        f"{len(runs)} seeds, mIoU {scores.mean():.4f} ± {scores.std(ddof=1):.4f}, {runs[0].groups} groups of images\n"
    )
    print("| seeds per side | wrong verdicts | half width of the interval |")
    print("| ---: | ---: | ---: |")
    for seeds in (count for count in SEEDS if 2 * count <= len(runs)):
        wrong, half = wrong_verdicts(runs, seeds)
        print(f"| {seeds} | {100 * wrong:.1f} % | {100 * half:.2f} points |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
