"""The answer of a report in words: per setting, the best methods, the worse ones, and the cheapest of the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    rows = here.sort_values(["mean", "label"], ascending=[False, True])
    of = {verdict: rows[rows["to_best"] == verdict] for verdict in (BEST, TIED, WORSE, NO_VERDICT, NOT_COMPARABLE)}
    names = {verdict: ", ".join(found["label"]) for verdict, found in of.items()}
    tested = pd.concat([of[TIED], of[WORSE]])
    (best,) = rows_of(of[BEST])
    score = f"{best.label} has the highest {comparison.metric}, {write(best.mean)}"
    about_labels = comparison.about_labels(rows["setting"].iloc[0])
    if len(rows) == 1:
        yield f"{score}; there is no other method."
        yield from about_labels
        return
    if tested.empty:
        reasons = sorted(set(rows["to_best_reason"]) - {""})
        yield f"{score}, but there is no verdict: {'; '.join(reasons)}."
        yield from about_labels
        return
    yield f"{score}."
    if names[TIED]:
        candidates = pd.concat([of[BEST], of[TIED]])
        cheapest = candidates[candidates["trained_method"] == candidates["trained_method"].min()]
        size = _size(next(rows_of(cheapest)))
        yield f"Not distinguishable from it: {names[TIED]}."
        if len(cheapest) == 1:
            yield f"The cheapest of these {len(candidates)} is {cheapest['label'].iloc[0]}, which trains {size}."
        else:
            yield f"The cheapest of these {len(candidates)} are {', '.join(cheapest['label'])}, which train {size}."
    if names[WORSE]:
        yield f"Worse: {names[WORSE]}."
    for verdict in (NO_VERDICT, NOT_COMPARABLE):
        for reason, here in of[verdict].groupby("to_best_reason"):
            yield f"{verdict.capitalize()}: {', '.join(here['label'])} ({reason})."
    if (tested["to_best_seeds"] == 2).any():
        yield "With two seeds, verdicts are wrong more often than the nominal 5 %."
    if 0 < best.groups < FEW_GROUPS:
        yield f"The test images are only {counted(best.groups, 'group')}."
    if best.rare_classes:
        yield f"Classes in fewer than {RARE} groups: {best.rare_classes}; verdicts are less reliable."
    yield from about_labels


def _size(row: Any) -> str:
    trained = int(row.trained_method)
    return f"{trained:,} parameters besides the head" if trained else "the head alone"
