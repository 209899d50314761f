"""What a study comes to: its cells, what is done of them, what is left. Nothing here trains or imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from harness.cells.resolve import Cell, Request, Resolver
from harness.errors import UserError
from harness.models.backbones.packaged import display_name
from harness.runs.state import RunState
from harness.runs.store import RunStore
from harness.spec import Spec
from studies.search.spec import SearchFolder, SearchSpec, make_space
from studies.study import MethodArm, Study, Tune

CellState = RunState | Literal["to do", "waiting", "damaged"]
"""A run's state; `to do`: never begun; `waiting`: for its search to end, which decides its hyperparameters; `damaged`:
done once, but its result cannot be read, and is done again."""

FINAL: frozenset[CellState] = frozenset({"done", "diverged", "unsupported"})
"""What a repetition would end as again. Every other state is tried (again) when the study is."""
FAILED: frozenset[CellState] = frozenset(state for state in RunState if state.failed)


@dataclass
class PlannedCell:
    """One cell of a study and how far it is."""

    label: str
    request: Request
    spec: Spec | None
    """None where a search must end first, or the cell cannot even be made out (then `state` is `failed`)."""
    state: CellState
    reason: str | None = None
    miou: float | None = None
    seconds: float | None = None
    """Of training, where it is done."""

    @property
    def fingerprint(self) -> str | None:
        return self.spec.fingerprint if self.spec else None


@dataclass
class PlannedSearch:
    """The search of one row; `cells` are the row's seeds, which take its best hyperparameters."""

    label: str
    request: Request
    folder: SearchFolder
    tune: Tune
    cells: list[PlannedCell]

    @property
    def finished(self) -> bool:
        return self.folder.is_finished(self.tune.trials)


@dataclass
class Plan:
    """A study's cells in its own order."""

    study: Study
    cells: list[PlannedCell] = field(default_factory=list)
    searches: list[PlannedSearch] = field(default_factory=list)

    def count(self) -> Counter[CellState]:
        return Counter(cell.state for cell in self.cells)

    @property
    def left(self) -> list[PlannedCell]:
        return [cell for cell in self.cells if cell.state not in FINAL]

    def seconds_left(self) -> float | None:
        """Of training, in one process, by the runs of this study that are done; None where there is none to go by."""
        trials = sum(search.tune.trials - len([t for t in search.folder.trials() if t.state != "running"])
                     for search in self.searches if not search.finished)  # fmt: skip
        known = [cell.seconds for cell in self.cells if cell.seconds is not None]
        return fmean(known) * (len(self.left) + trials) if known else None


def make_plan(study: Study, store: RunStore, data: Path, ask_support: bool = False) -> Plan:
    """Look at every cell. With `ask_support`, pairs that were never tried are asked about, which may import torch
    in another process; without it such a cell is `to do`.

    Raises `UserError` for what is wrong with the study as a whole; what is wrong with one cell is that cell's state.
    """
    resolve = Resolver(store, data)
    plan = Plan(study)
    study.check(data, store.cache)
    for arm, request in study.requests():
        seeds = [replace(request, seed=seed) for seed in study.seeds]
        if study.tune is None:
            plan.cells += [_look_at(arm.label, seed, resolve, store) for seed in seeds]
            continue
        row = _plan_search(study.tune, arm, request, seeds, resolve, store)
        plan.cells += row.cells if isinstance(row, PlannedSearch) else row
        if isinstance(row, PlannedSearch):
            plan.searches.append(row)
    if ask_support:
        _mark_unsupported(plan, resolve, store)
    return plan


def _plan_search(
    tune: Tune, arm: MethodArm, request: Request, seeds: list[Request], resolve: Resolver, store: RunStore
) -> PlannedSearch | list[PlannedCell]:
    """The row's search with its cells, or the cells alone where no search can be made out."""
    searched = replace(request, part="dev", seed=tune.seed)
    try:
        cell = resolve(searched)
        own = cell.method.Hyperparameters.model_fields
        given = {name: text for name, text in tune.space.items() if name in own}
        names = None if tune.parameters is None else [name for name in tune.parameters if name in own]
        space = make_space(cell.method, names, given, request.settings)
        spec = SearchSpec.of(cell, space, tune.sampler, tune.pruner, ("miou",))
    except UserError as error:
        return [PlannedCell(arm.label, seed, None, "failed", str(error)) for seed in seeds]
    recorded = [_look_at(arm.label, seed, resolve, store) for seed in seeds]
    if all(cell.state == "unsupported" for cell in recorded):
        return recorded
    row = PlannedSearch(arm.label, searched, SearchFolder.under(store.root, spec), tune, [])
    row.cells = [PlannedCell(arm.label, seed, None, "waiting") for seed in seeds]
    if row.finished:
        settle(row, resolve, store)
    return row


def settle(row: PlannedSearch, resolve: Resolver, store: RunStore) -> None:
    """Give the row's cells the hyperparameters that its finished search found."""
    best = row.folder.best(row.tune.trials)
    for cell in row.cells:
        if best is None:
            reasons = Counter(trial.reason for trial in row.folder.trials() if trial.reason)
            first = f", most often: {reasons.most_common(1)[0][0]}" if reasons else ""
            cell.state, cell.reason = "failed", f"none of {row.tune.trials} trials was completed{first}"
        else:
            cell.request = replace(cell.request, settings={**cell.request.settings, **best.settings})
            vars(cell).update(vars(_look_at(cell.label, cell.request, resolve, store)))


def _look_at(label: str, request: Request, resolve: Resolver, store: RunStore) -> PlannedCell:
    try:
        spec = resolve(request).spec
    except UserError as error:
        return PlannedCell(label, request, None, "failed", str(error))
    cell = PlannedCell(label, request, spec, "to do")
    refresh(cell, store)
    return cell


def refresh(cell: PlannedCell, store: RunStore) -> None:
    """Read how far the cell's run is."""
    assert cell.spec is not None
    run = store.folder(cell.spec)
    outcome = store.outcome(run)
    cell.state, cell.reason = outcome.state, outcome.reason
    if outcome.state is RunState.RUNNING:
        cell.reason = f"executed by {store.lock_owner(run) or 'another process'}"
    elif outcome.state is RunState.DAMAGED:
        cell.reason = f"{run.path}: {outcome.reason}; the run is executed again"
    elif (result := run.result()) is not None:
        cell.miou, cell.seconds = result.metrics.miou, result.train_seconds


def _mark_unsupported(plan: Plan, resolve: Resolver, store: RunStore) -> None:
    from harness.cells.compatibility import reasons_against

    asked = list(_unsettled(plan, resolve))
    if not asked:
        return
    for (_, cells), reason in zip(asked, reasons_against([cell for cell, _ in asked], store.cache), strict=True):
        for planned in cells if reason is not None else ():
            planned.state, planned.reason, planned.spec = "unsupported", reason, resolve(planned.request).spec
    unsupported = {id(cell) for cell in plan.cells if cell.state == "unsupported"}
    plan.searches = [row for row in plan.searches if not all(id(cell) in unsupported for cell in row.cells)]


def _unsettled(plan: Plan, resolve: Resolver) -> Iterator[tuple[Cell, list[PlannedCell]]]:
    for row in plan.searches:
        if not row.finished:
            yield resolve(row.request), row.cells
    in_searches = {id(cell) for row in plan.searches for cell in row.cells}
    for planned in plan.cells:
        if planned.spec is not None and planned.state not in FINAL and id(planned) not in in_searches:
            yield resolve(planned.request), [planned]


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    """The study's table: one row a method, backbone, dataset and head, its seeds gathered."""
    rows: dict[tuple[str, ...], list[PlannedCell]] = {}
    for cell in plan.cells:
        key = (cell.request.backbone, cell.request.weights, cell.request.dataset, cell.request.head, cell.label)
        rows.setdefault(key, []).append(cell)
    return [
        {
            "backbone": display_name(key[0], key[1]),
            "dataset": Path(key[2]).name,
            "head": key[3],
            "label": key[4],
            "cells": cells,
        }
        for key, cells in rows.items()
    ]
