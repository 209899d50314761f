"""The plan of a study: its cells with their states, and the searches that some of them wait for.

Nothing here trains or imports torch. `scheduler.py` executes the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.cells.resolve import Cell, Request, Resolver
from harness.errors import UserError
from harness.models.backbones.packaged import display_name
from harness.runs.state import RunState
from harness.runs.store import RunStore
from harness.spec import Spec
from studies.search.spec import SearchFolder, SearchSpec, make_space
from studies.study import MethodArm, Study, Tune


@dataclass
class PlannedCell:
    """One cell of a study and its state."""

    label: str
    request: Request
    spec: Spec | None
    """None if a search must end first, or if the request is invalid (then `state` is `failed`)."""
    state: RunState
    reason: str | None = None
    miou: float | None = None
    seconds: float | None = None
    """Training time, if the cell is done."""

    @property
    def fingerprint(self) -> str | None:
        return self.spec.fingerprint if self.spec else None


@dataclass
class PlannedSearch:
    """The search of one row of the table; `cells` are the row's seeds, which use its best hyperparameters."""

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

    def count(self) -> Counter[RunState]:
        return Counter(cell.state for cell in self.cells)

    @property
    def left(self) -> list[PlannedCell]:
        return [cell for cell in self.cells if not cell.state.final]

    def seconds_left(self) -> float | None:
        """Estimated training time of the remaining cells in one process; None if no cell is done yet."""
        trials = sum(search.tune.trials - search.folder.count_ended(search.tune.trials) for search in self.searches)
        known = [cell.seconds for cell in self.cells if cell.seconds is not None]
        return fmean(known) * (len(self.left) + trials) if known else None


def make_plan(study: Study, store: RunStore, data: Path, ask_support: bool = False) -> Plan:
    """Read the state of every cell.

    With `ask_support`, methods that were never tried on a backbone are checked, which may import torch in another
    process; without it such a cell is pending. Raises `UserError` for a mistake in the study as a whole; a mistake in
    one cell becomes that cell's state.
    """
    resolve = Resolver(store, data)
    plan = Plan(study)
    study.check(data, store.cache)
    for arm, request in study.requests():
        seeds = [replace(request, seed=seed) for seed in study.seeds]
        if study.tune is None:
            plan.cells += [_plan_cell(arm.label, seed, resolve, store) for seed in seeds]
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
    """The row's search with its cells, or only the cells if there is no search."""
    searched = replace(request, part="dev", seed=tune.seed)
    try:
        cell = resolve(searched)
        own = cell.method.Hyperparameters.model_fields
        ranges = {name: text for name, text in tune.space.items() if name in own}
        names = None if tune.parameters is None else [name for name in tune.parameters if name in own]
        space = make_space(cell.method, names, ranges, request.settings)
        spec = SearchSpec.of(cell, space, tune.sampler, tune.pruner, ("miou",))
    except UserError as error:
        return [PlannedCell(arm.label, seed, None, RunState.FAILED, str(error)) for seed in seeds]
    recorded = [_plan_cell(arm.label, seed, resolve, store) for seed in seeds]
    if all(cell.state is RunState.UNSUPPORTED for cell in recorded):
        return recorded
    row = PlannedSearch(arm.label, searched, SearchFolder.under(store.root, spec), tune, [])
    row.cells = [PlannedCell(arm.label, seed, None, RunState.WAITING) for seed in seeds]
    if row.finished:
        settle(row, resolve, store)
    return row


def settle(row: PlannedSearch, resolve: Resolver, store: RunStore) -> None:
    """Set the hyperparameters of the row's cells from its finished search."""
    best = row.folder.best(row.tune.trials)
    for cell in row.cells:
        if best is None:
            reasons = Counter(trial.reason for trial in row.folder.trials() if trial.reason)
            first = f", most often: {reasons.most_common(1)[0][0]}" if reasons else ""
            cell.state, cell.reason = RunState.FAILED, f"none of {row.tune.trials} trials is complete{first}"
        else:
            cell.request = replace(cell.request, settings={**cell.request.settings, **best.settings})
            vars(cell).update(vars(_plan_cell(cell.label, cell.request, resolve, store)))


def _plan_cell(label: str, request: Request, resolve: Resolver, store: RunStore) -> PlannedCell:
    try:
        spec = resolve(request).spec
    except UserError as error:
        return PlannedCell(label, request, None, RunState.FAILED, str(error))
    cell = PlannedCell(label, request, spec, RunState.TO_DO)
    refresh(cell, store)
    return cell


def refresh(cell: PlannedCell, store: RunStore) -> None:
    """Read the state of the cell's run."""
    assert cell.spec is not None
    run = store.folder(cell.spec)
    outcome, result = store.read(run)
    cell.state, cell.reason = outcome.state, outcome.reason
    if outcome.state is RunState.RUNNING:
        cell.reason = f"executed by {store.lock_owner(run) or 'another process'}"
    elif outcome.state is RunState.DAMAGED:
        cell.reason = f"{run.path}: {outcome.reason}; the run is executed again"
    elif result is not None:
        cell.miou, cell.seconds = result.metrics.miou, result.train_seconds


def _mark_unsupported(plan: Plan, resolve: Resolver, store: RunStore) -> None:
    from harness.cells.compatibility import reasons_against

    unsettled = list(_unsettled(plan, resolve))
    if not unsettled:
        return
    reasons = reasons_against([cell for cell, _ in unsettled], store.cache)
    for (_, cells), reason in zip(unsettled, reasons, strict=True):
        for planned in cells if reason is not None else ():
            planned.state, planned.reason = RunState.UNSUPPORTED, reason
            planned.spec = resolve(planned.request).spec
    unsupported = {id(cell) for cell in plan.cells if cell.state is RunState.UNSUPPORTED}
    plan.searches = [row for row in plan.searches if not all(id(cell) in unsupported for cell in row.cells)]


def _unsettled(plan: Plan, resolve: Resolver) -> Iterator[tuple[Cell, list[PlannedCell]]]:
    for row in plan.searches:
        if not row.finished:
            yield resolve(row.request), row.cells
    in_searches = {id(cell) for row in plan.searches for cell in row.cells}
    for planned in plan.cells:
        if planned.spec is not None and not planned.state.final and id(planned) not in in_searches:
            yield resolve(planned.request), [planned]


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    """The study's table: one row for each method, backbone, dataset and head, with the cells of all its seeds."""
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
