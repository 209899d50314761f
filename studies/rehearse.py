"""`compare --rehearse`: a few steps of every distinct cell at its real shapes, before days are spent on a study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from harness.cells.request import Request
from harness.cells.resolve import Resolver
from harness.engine.options import ExecutionOptions
from harness.errors import UserError
from harness.method import HeadHyperparameters, Hyperparameters
from harness.models.backbones.packaged import display_name
from harness.runs.state import Outcome
from harness.util.progress import say
from harness.util.text import counted, duration
from studies.plan import Plan, PlannedCell, PlannedSearch
from studies.search.spec import Range
from studies.study import shown_label

GIB = 2**30
RATES = {*Hyperparameters.model_fields, *HeadHyperparameters.model_fields}
"""Hyperparameters that do not change the shape of a step."""


@dataclass
class Rehearsed:
    """One row of the table: cells and trials that differ in seed and rates alone."""

    label: str
    request: Request
    runs: int
    """Runs of the study that are like this one and have not ended, its trials included."""
    reason: str | None = None
    """Why it fails."""
    step_seconds: float = 0.0
    image_seconds: float = 0.0
    peak_bytes: int | None = None
    run_seconds: float = 0.0

    def as_json(self) -> dict[str, object]:
        request = self.request
        where = {name: getattr(request, name) for name in ("method", "backbone", "weights", "dataset", "head")}
        own = {name: value for name, value in vars(self).items() if name != "request"}
        return {**own, **where, "settings": request.settings}

    def line(self) -> dict[str, str]:
        peak = "-" if self.peak_bytes is None else f"{self.peak_bytes / GIB:.2f}"
        worked = self.reason is None
        return {
            "backbone": display_name(self.request.backbone, self.request.weights),
            "dataset": self.request.dataset,
            "head": self.request.head,
            "method": shown_label(self.label, [self.request.head]),
            "step, ms": f"{1000 * self.step_seconds:.0f}" if worked else "-",
            "image, ms": f"{1000 * self.image_seconds:.0f}" if worked else "-",
            "peak, GiB": peak if worked else "-",
            "one run": duration(self.run_seconds) if worked else "-",
            "runs left": str(self.runs),
            "state": "works" if worked else f"{self.reason}",
        }


def rehearse(plan: Plan, options: ExecutionOptions, resolve: Resolver) -> list[Rehearsed]:
    """Rehearse the cells that have not ended, one after the other in this process.

    A searched hyperparameter that changes shapes is rehearsed at its largest value. Raises `UserError` for a device
    that is not available.
    """
    from harness.engine import rehearsal

    rows = list(_distinct(plan))
    for index, row in enumerate(rows, start=1):
        say(f"{index} of {len(rows)}: {row.label} on {row.request.backbone}, {row.request.dataset}, {row.request.head}")
        try:
            cell = resolve(row.request)
        except UserError as error:
            row.reason = str(error)
            continue
        found = rehearsal.rehearse(cell, options)
        if isinstance(found, Outcome):
            row.reason = str(found)
        else:
            row.step_seconds, row.image_seconds = found.step_seconds, found.image_seconds
            row.peak_bytes, row.run_seconds = found.peak_bytes, found.run_seconds
    return rows


def total(rows: list[Rehearsed], jobs: int) -> str:
    """The time of the whole study, in words."""
    seconds = sum(row.runs * row.run_seconds for row in rows if row.reason is None)
    failed = sum(row.runs for row in rows if row.reason is not None)
    left_out = f", without the {counted(failed, 'run')} of cells that fail" if failed else ""
    return f"estimated: {duration(seconds / jobs)} with {jobs} at a time on devices like this one{left_out}"


def _distinct(plan: Plan) -> Iterator[Rehearsed]:
    for head in plan.heads:
        if not head.finished:
            yield Rehearsed(head.label, head.request, (head.trials - head.ended) * len(head.tune.seeds))
    searched = {id(cell): search for search in plan.searches for cell in search.cells}
    rows: dict[tuple[object, ...], list[PlannedCell]] = {}
    for cell in plan.cells:
        if not cell.state.final:
            request = cell.request
            key = (cell.label, request.backbone, request.weights, request.dataset, request.head, request.budget)
            rows.setdefault((*map(str, key),), []).append(cell)
    for cells in rows.values():
        search = searched.get(id(cells[0]))
        request, trials = cells[0].request, 0
        if search is not None and not search.finished:
            request = replace(request, settings=request.settings | _largest(search))
            trials = (search.trials - search.ended) * len(search.tune.seeds) if search.space else 0
        yield Rehearsed(cells[0].label, request, len(cells) + trials)


def _largest(search: PlannedSearch) -> dict[str, object]:
    """The largest value of each searched hyperparameter that can change shapes."""
    numbers = ((name, _highest(range_)) for name, range_ in search.space.items() if name not in RATES)
    return {name: value for name, value in numbers if value is not None}


def _highest(range_: Range) -> float | int | None:
    if range_.choices is None:
        return int(range_.high) if range_.integer and range_.high is not None else range_.high
    numbers = [one for one in range_.choices if isinstance(one, int | float) and not isinstance(one, bool)]
    return max(numbers) if len(numbers) == len(range_.choices) else None
