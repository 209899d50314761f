"""The answer of a report in words: per setting, the best methods, the worse ones, and the cheapest of the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pandas as pd

from harness.runs.difference import FEW_GROUPS, RARE
from harness.util.text import counted
from reports.analysis.comparison import Comparison
from reports.analysis.paired import BEST, NO_VERDICT, NOT_COMPARABLE, TIED, WORSE
from reports.read.frames import rows_of


def answers(comparison: Comparison, write: Callable[[float], str]) -> list[tuple[str, str]]:
    """Name and answer of every setting with a score; `write` formats a score."""
    scored = comparison.summary[comparison.summary["to_best"] != ""]
    return [
        (name, " ".join(_sentences(here, comparison, write)))
        for (name, _), here in scored.groupby(["setting_name", "setting"], sort=True)
    ]


def _sentences(here: pd.DataFrame, comparison: Comparison, write: Callable[[float], str]) -> Iterator[str]:
    rows = list(rows_of(here.sort_values(["mean", "label"], ascending=[False, True])))
    verdicts = (BEST, TIED, WORSE, NO_VERDICT, NOT_COMPARABLE)
    of = {verdict: [row for row in rows if row.to_best == verdict] for verdict in verdicts}
    tested = [*of[TIED], *of[WORSE]]
    (best,) = of[BEST]
    score = f"{best.label} has the highest {comparison.metric}, {write(best.mean)}"
    about_labels = comparison.about_labels(best.setting)
    if len(rows) == 1:
        yield f"{score}; there is no other method."
        yield from about_labels
        return
    if not tested:
        reasons = sorted({row.to_best_reason for row in rows} - {""})
        yield f"{score}, but there is no verdict: {'; '.join(reasons)}."
        yield from about_labels
        return
    yield f"{score}."
    if of[TIED]:
        candidates = [best, *of[TIED]]
        least = min(row.trained_method for row in candidates)
        cheapest = [row for row in candidates if row.trained_method == least]
        yield f"Not distinguishable from it: {_labels(of[TIED])}."
        be, train = ("is", "trains") if len(cheapest) == 1 else ("are", "train")
        yield f"The cheapest of these {len(candidates)} {be} {_labels(cheapest)}, which {train} {_size(least)}."
    if of[WORSE]:
        yield f"Worse: {_labels(of[WORSE])}."
    for verdict in (NO_VERDICT, NOT_COMPARABLE):
        for reason in sorted({row.to_best_reason for row in of[verdict]}):
            labels = _labels(row for row in of[verdict] if row.to_best_reason == reason)
            yield f"{verdict.capitalize()}: {labels} ({reason})."
    if any(row.to_best_seeds == 2 for row in tested):
        yield "With two seeds, verdicts are wrong more often than the nominal 5 %."
    if 0 < best.groups < FEW_GROUPS:
        yield f"The test images are only {counted(best.groups, 'group')}."
    if best.rare_classes:
        yield f"Classes in fewer than {RARE} groups: {best.rare_classes}; verdicts are less reliable."
    yield from about_labels


def _labels(rows: Iterable[Any]) -> str:
    return ", ".join(row.label for row in rows)


def _size(trained: float) -> str:
    return f"{int(trained):,} parameters besides the head" if trained else "the head alone"
