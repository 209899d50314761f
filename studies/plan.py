"""The plan of a study: its cells with their states, and the searches that some of them wait for.

Nothing here trains or imports torch. `scheduler.py` executes the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.cells.resolve import Cell, Request, Resolver
from harness.data.base import NoData, SegmentationDataset
from harness.errors import UserError
from harness.method import methods
from harness.models.backbones.packaged import display_name
from harness.runs.result import Scores
from harness.runs.state import RunState
from harness.runs.store import RunStore
from harness.spec import Spec
from studies.search.spec import Range, SearchFolder, SearchSpec, declared_space
from studies.study import Row, Study, shown_label
from studies.tune import HEAD_LR, HEAD_METHOD, Tune


@dataclass
class PlannedCell:
    """One cell of a study and its state."""

    label: str
    request: Request
    spec: Spec | None
    """None if a search must end first, or if the request is invalid (then `state` is `failed` or `no data`)."""
    state: RunState
    reason: str | None = None
    scores: Scores | None = None
    """If the cell is done."""
    seconds: float | None = None
    """Training time, if the cell is done."""

    @property
    def miou(self) -> float | None:
        return self.scores.miou if self.scores else None

    @property
    def fingerprint(self) -> str | None:
        return self.spec.fingerprint if self.spec else None


@dataclass
class PlannedSearch:
    """The search of one row of the table, or of the head's learning rate for several rows."""

    label: str
    request: Request
    tune: Tune
    trials: int
    space: dict[str, Range]
    """Empty where the row has nothing to search: it only waits for the head's learning rate."""
    own: tuple[str, ...] = ()
    """The hyperparameters for which the row has a range of its own, not the study's."""
    cells: list[PlannedCell] = field(default_factory=list)
    """The row's seeds, which use the chosen hyperparameters; none where it is the head's search."""
    head: PlannedSearch | None = None
    """The search of the head's learning rate that must end first."""
    rows: list[PlannedSearch] = field(default_factory=list)
    """Where this is the head's search: the rows that wait for it."""
    folder: SearchFolder | None = None
    """None where it is not known yet, or where there is nothing to search."""
    chosen: dict[str, Any] | None = None
    """The best hyperparameters, the head's among them. None until the search is settled, or if no trial is complete."""

    @property
    def finished(self) -> bool:
        if self.chosen is not None:
            return True
        if self.head is not None and self.head.chosen is None:
            return self.head.finished
        return not self.space or (self.folder is not None and self.folder.is_finished(self.trials))

    @property
    def ended(self) -> int:
        """Number of trials that have ended."""
        return 0 if self.folder is None else self.folder.count_ended(self.trials)

    def scores(self) -> list[float]:
        """Of the complete trials, by the first objective; trials with the same hyperparameters share a run and count
        once."""
        trials = [trial for trial in self.folder.trials() if trial.number < self.trials] if self.folder else []
        return list({trial.fingerprint: trial.values[0] for trial in trials if trial.values}.values())

    def doubts(self) -> list[str]:
        """What makes the choice doubtful, the head's learning rate included: `lr=0.01 is the highest tried` for a value
        at an edge of its range, or `all 3 trials of lr score the same`, where nothing chose it."""
        scores, chosen = self.scores(), self.chosen or {}
        own = []
        if len(scores) > 1 and len(set(scores)) == 1:
            own = [f"all {len(scores)} trials of {', '.join(self.space)} score the same"]
        elif chosen:
            edges = ((name, chosen[name], range_.edge(chosen[name])) for name, range_ in self.space.items())
            own = [f"{name}={value:g} is the {edge} tried" for name, value, edge in edges if edge]
        return own + (self.head.doubts() if self.head is not None and chosen else [])

    def own_ranges(self) -> list[str]:
        """`lr over 1e-05|0.0001, its own range` for each hyperparameter in which the row departs from the study."""
        return [f"{name} over {self.space[name]}, its own range" for name in self.own if name in self.space]

    def undeclared(self) -> list[str]:
        """The searched values outside of their declared ranges: `full: lr=0.01 is outside its declared range …`."""
        declared = declared_space(methods.get(self.request.method))
        label = shown_label(self.label, [self.request.head])
        found = []
        for name, range_ in self.space.items():
            if name in declared and (beyond := range_.beyond(declared[name])):
                values = ", ".join(f"{value:g}" for value in beyond)
                found.append(f"{label}: {name}={values} is outside its declared range {declared[name]}")
        return found

    def reason_for_none(self) -> str:
        """Why there are no chosen hyperparameters although the search has ended."""
        if self.head is not None and self.head.chosen is None:
            return f"no {HEAD_LR}: {self.head.reason_for_none()}"
        reasons = Counter(trial.reason for trial in self.folder.trials() if trial.reason) if self.folder else Counter()
        first = f", most often: {reasons.most_common(1)[0][0]}" if reasons else ""
        return f"none of {self.trials} trials is complete{first}"


@dataclass
class Plan:
    """A study's cells in its own order."""

    study: Study
    cells: list[PlannedCell] = field(default_factory=list)
    searches: list[PlannedSearch] = field(default_factory=list)
    heads: list[PlannedSearch] = field(default_factory=list)
    """The searches of the head's learning rate, which come first."""
    datasets: list[SegmentationDataset] = field(default_factory=list)
    """Those whose files are there and valid; the cells of the others have failed or have no data."""

    def count(self) -> Counter[RunState]:
        return Counter(cell.state for cell in self.cells)

    @property
    def left(self) -> list[PlannedCell]:
        return [cell for cell in self.cells if not cell.state.final]

    def seconds_left(self) -> float | None:
        """Estimated training time of the remaining cells in one process; None if no cell is done yet."""
        trials = sum(
            (search.trials - search.ended) * len(search.tune.seeds) for search in (*self.heads, *self.searches)
        )
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
    heads: dict[tuple[Any, ...], PlannedSearch | UserError | None] = {}
    for row in study.rows():
        seeds = [replace(row.request, seed=seed) for seed in study.seeds]
        if study.tune is None:
            plan.cells += [_plan_cell(row.arm.label, seed, resolve, store) for seed in seeds]
            continue
        key = row.head.backbone, row.head.weights, row.head.dataset, row.head.head
        if key not in heads:
            heads[key] = _plan_head(study.tune, row.head, resolve, store)
        planned = _plan_search(study.tune, row, seeds, heads[key], resolve, store)
        plan.cells += planned.cells if isinstance(planned, PlannedSearch) else planned
        if isinstance(planned, PlannedSearch):
            plan.searches.append(planned)
    plan.heads = [head for head in heads.values() if isinstance(head, PlannedSearch) and head.rows]
    plan.datasets = list(_valid_datasets(plan, resolve))
    if ask_support:
        _mark_unsupported(plan, resolve, store)
    return plan


def _plan_head(tune: Tune, request: Request, resolve: Resolver, store: RunStore) -> PlannedSearch | UserError | None:
    """The search of the head's learning rate; None if the study has none."""
    if tune.head is None:
        return None
    searched = replace(request, part="dev", seed=tune.seeds[0])
    space = tune.head_space()
    trials = tune.trials_of(space, tune.head.trials)
    head = PlannedSearch(f"{HEAD_LR}, with {HEAD_METHOD}", searched, tune, trials, space)
    try:
        _define(head, resolve, store)
    except UserError as error:  # of the cell, such as a missing dataset
        return error
    if head.finished:
        settle(head, resolve, store)
    return head


def _valid_datasets(plan: Plan, resolve: Resolver) -> Iterator[SegmentationDataset]:
    for name in dict.fromkeys(cell.request.dataset for cell in plan.cells):
        with suppress(UserError):
            dataset = resolve.dataset(name)
            if dataset.digest:  # checks the files
                yield dataset


def _plan_search(
    tune: Tune,
    row: Row,
    seeds: list[Request],
    head: PlannedSearch | UserError | None,
    resolve: Resolver,
    store: RunStore,
) -> PlannedSearch | list[PlannedCell]:
    """The row's search with its cells, or only the cells if there is no search."""
    label, searched = row.arm.label, replace(row.request, part="dev", seed=tune.seeds[0])
    try:
        if isinstance(head, UserError):
            raise head
        space = tune.space_of(row.request, row.arm.space)
        trials = tune.trials_of(space, tune.trials) if space else 0
        planned = PlannedSearch(label, searched, tune, trials, space, tuple(row.arm.space), head=head)
        resolve(searched)
        _define(planned, resolve, store)
    except UserError as error:
        return [_invalid(label, seed, error) for seed in seeds]
    recorded = [_plan_cell(label, seed, resolve, store) for seed in seeds]
    if all(cell.state is RunState.UNSUPPORTED for cell in recorded) or (head is None and not space):
        return recorded
    planned.cells = [PlannedCell(label, seed, None, RunState.WAITING) for seed in seeds]
    if head is not None:
        head.rows.append(planned)
    if planned.finished:
        settle(planned, resolve, store)
    return planned


def _define(search: PlannedSearch, resolve: Resolver, store: RunStore) -> None:
    """Set the search's folder, once the head's learning rate is known. Raises `UserError`."""
    of_head = {} if search.head is None else search.head.chosen
    if of_head is None or not search.space:
        return
    search.request = replace(search.request, settings={**search.request.settings, **of_head})
    tune, sampler = search.tune, search.tune.sampler_of(search.space)
    spec = SearchSpec.of(resolve(search.request), search.space, sampler, tune.pruner, seeds=tune.seeds)
    search.folder = SearchFolder.under(store.root, spec)


def settle(search: PlannedSearch, resolve: Resolver, store: RunStore) -> list[PlannedSearch]:
    """Set the hyperparameters of a finished search's cells, and define the searches that waited for it.

    Returns the search and the rows that waited.
    """
    own = {} if search.folder is None else getattr(search.folder.best(search.trials), "settings", None)
    of_head = {} if search.head is None else search.head.chosen
    search.chosen = None if own is None or of_head is None else {**of_head, **own}
    for cell in search.cells:
        if search.chosen is None:
            cell.state, cell.reason = RunState.FAILED, search.reason_for_none()
        else:
            cell.request = replace(cell.request, settings={**cell.request.settings, **search.chosen})
            vars(cell).update(vars(_plan_cell(cell.label, cell.request, resolve, store)))
    for row in search.rows:
        _define(row, resolve, store)
        if row.finished:
            settle(row, resolve, store)
    return [search, *search.rows]


def _plan_cell(label: str, request: Request, resolve: Resolver, store: RunStore) -> PlannedCell:
    try:
        spec = resolve(request).spec
    except UserError as error:
        return _invalid(label, request, error)
    cell = PlannedCell(label, request, spec, RunState.TO_DO)
    refresh(cell, store)
    return cell


def _invalid(label: str, request: Request, error: UserError) -> PlannedCell:
    state = RunState.NO_DATA if isinstance(error, NoData) else RunState.FAILED
    return PlannedCell(label, request, None, state, str(error))


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
        cell.scores, cell.seconds = result.metrics, result.train_seconds


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
    for head in plan.heads:
        head.rows = [row for row in head.rows if any(row is other for other in plan.searches)]
    plan.heads = [head for head in plan.heads if head.rows]


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
