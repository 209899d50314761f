"""Hyperparameter searches: the objective from trial to trial, and the importance of each hyperparameter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.ticker import MaxNLocator

from harness.runs.result import MEASURES_BY_NAME
from reports.read.collect import SearchRecord
from reports.render.plots.context import Plot, new_figure, shortened, slug
from reports.render.style import MUTED, series_styles


def search_histories(searches: list[SearchRecord]) -> Iterator[Plot]:
    for search in searches:
        trials = search.trials.assign(value=[values[0] if values else None for values in search.trials["values"]])
        objective = MEASURES_BY_NAME.get(search.definition["objectives"][0])
        if trials.empty or objective is None:
            continue
        method = search.definition["method"]
        colour = series_styles({method: method})[method].colour
        figure = new_figure(9.4, 2.7)
        history, shares = figure.subplots(1, 2, width_ratios=[1.5, 1])
        complete = trials[trials.state == "complete"].dropna(subset=["value"]).sort_values("number")
        history.plot(complete.number, complete.value, "o", color=colour, markersize=4, label="complete")
        best = complete.value.cummax() if objective.better == "higher" else complete.value.cummin()
        history.plot(complete.number, best, color=colour, linewidth=1.2, drawstyle="steps-post", label="best so far")
        for state, marker in (("pruned", "|"), ("failed", "x")):
            numbers = trials.number[trials.state == state]
            if len(numbers):
                places = np.full(len(numbers), 0.03)
                at_bottom = history.get_xaxis_transform()
                history.plot(numbers, places, marker, transform=at_bottom, color=MUTED, markersize=5, label=state)
        history.set(title="History", xlabel="trial", ylabel=f"{objective.label} on the dev split")
        history.xaxis.set_major_locator(MaxNLocator(integer=True))
        history.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2)
        importances = sorted(search.importances.items(), key=lambda item: (item[1], item[0]))
        shares.barh(range(len(importances)), [share for _, share in importances], color=colour, height=0.6)
        shares.set_yticks(range(len(importances)), [shortened(name, 24) for name, _ in importances])
        shares.set(title="Importance", xlabel="share of all importances (PED-ANOVA)")
        shares.grid(axis="y", visible=False)
        if not importances:
            shares.text(0.5, 0.5, "not computed", transform=shares.transAxes, ha="center", color=MUTED)
        counts = ", ".join(f"{count} {state}" for state, count in trials.state.value_counts().sort_index().items())
        yield Plot(
            f"search-{slug(search.name)}",
            "searches",
            f"Search: {shortened(search.name, 80)}",
            f"{len(trials)} trials ({counts}), scored on the dev split, which is held out of the training data.",
            figure,
        )
