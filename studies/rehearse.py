"""`compare --rehearse`: a few steps of every distinct cell at its real shapes, before days are spent on a study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cells.request import Request
from harness.cells.resolve import Resolver
from harness.engine.options import ExecutionOptions
from harness.errors import UserError
from harness.method import Hyperparameters
from harness.models.backbones.packaged import display_name
from harness.runs.state import Outcome
from harness.util.progress import say
from harness.util.text import counted, duration
from studies.plan import Plan, PlannedCell, PlannedSearch, rows_of
from studies.search.spec import Range
from studies.study import shown_label

if TYPE_CHECKING:
    from harness.engine.rehearsal import Rehearsal

GIB = 2**30
WITHOUT_SHAPE = frozenset(Hyperparameters.model_fields)
"""Hyperparameters that do not change the shape of a step: rates, and weight decay."""


@dataclass
class Rehearsed:
    """One row of the table: cells and trials that differ only in seed and rates."""

    label: str
    request: Request
    runs: int
    """Runs of the study that are like this one and have not ended, its trials included."""
    reason: str | None = None
    """Why it fails."""
    found: Rehearsal | None = None
    """None if it fails."""

    def as_json(self) -> dict[str, object]:
        names = ("method", "backbone", "weights", "dataset", "head", "settings")
        where = {name: getattr(self.request, name) for name in names}
        figures = {} if self.found is None else asdict(self.found)
        return {"label": self.label, **where, "runs": self.runs, "reason": self.reason, **figures}

    def line(self) -> dict[str, str]:
        step = image = peak = run = "-"
        if self.found is not None:
            step, image = f"{1000 * self.found.step_seconds:.0f}", f"{1000 * self.found.image_seconds:.0f}"
            peak = "-" if self.found.peak_bytes is None else f"{self.found.peak_bytes / GIB:.2f}"
            run = duration(self.found.run_seconds)
        return {
            "backbone": display_name(self.request.backbone, self.request.weights),
            "dataset": Path(self.request.dataset).name,
            "head": self.request.head,
            "method": shown_label(self.label, [self.request.head]),
            "step, ms": step,
            "image, ms": image,
            "peak, GiB": peak,
            "one run": run,
            "runs left": str(self.runs),
            "state": self.reason or "works",
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
            row.found = found
    return rows


def total(rows: list[Rehearsed], jobs: int) -> str:
    """The time and the disk space of the whole study, as text."""
    seconds = sum(row.runs * row.found.run_seconds for row in rows if row.found is not None)
    gibibytes = sum(row.runs * row.found.delta_bytes for row in rows if row.found is not None) / GIB
    failed = sum(row.runs for row in rows if row.found is None)
    left_out = f", without the {counted(failed, 'run')} of cells that fail" if failed else ""
    return (
        f"estimated: {duration(seconds / jobs)} with {jobs} at a time on devices like this one, "
        f"and {gibibytes:.2f} GiB of trained tensors under --runs{left_out}"
    )


def _distinct(plan: Plan) -> Iterator[Rehearsed]:
    for head in plan.heads:
        if not head.finished:
            yield Rehearsed(head.label, head.request, (head.trials - head.ended) * len(head.tune.seeds))
    searched = {id(cell): search for search in plan.searches for cell in search.cells}
    for row in rows_of(plan):
        cells: list[PlannedCell] = [cell for cell in row["cells"] if not cell.state.final]
        if not cells:
            continue
        search = searched.get(id(cells[0]))
        request, trials = cells[0].request, 0
        if search is not None and not search.finished:
            request = replace(request, settings=request.settings | _largest(search))
            trials = (search.trials - search.ended) * len(search.tune.seeds) if search.space else 0
        yield Rehearsed(cells[0].label, request, len(cells) + trials)


def _largest(search: PlannedSearch) -> dict[str, object]:
    """The largest value of each searched hyperparameter that can change shapes."""
    numbers = ((name, _highest(range_)) for name, range_ in search.space.items() if name not in WITHOUT_SHAPE)
    return {name: value for name, value in numbers if value is not None}


def _highest(range_: Range) -> float | int | None:
    if range_.choices is None:
        return int(range_.high) if range_.integer and range_.high is not None else range_.high
    numbers = [one for one in range_.choices if isinstance(one, int | float) and not isinstance(one, bool)]
    return max(numbers) if len(numbers) == len(range_.choices) else None
