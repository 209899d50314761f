"""Executes the remaining cells of a study. Its output is in `progress.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from harness.cells.resolve import Resolver
from harness.engine.options import ExecutionOptions
from harness.launch.choice import LauncherChoice
from harness.runs.locks import AlreadyLocked
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.util.progress import say, warn
from harness.util.text import counted
from studies.plan import Plan, PlannedSearch, make_plan
from studies.progress import LiveTable, describe, work_left
from studies.scheduler import Scheduler, SearchTask
from studies.study import Study

if TYPE_CHECKING:
    from studies.search.search import Search


def compare(
    study: Study,
    options: ExecutionOptions,
    choice: LauncherChoice,
    storage: str | None,
    quiet: bool,
) -> Plan:
    """Execute the remaining cells of a study and return its plan with the new states. A finished study is only read.

    `storage`: where Optuna stores searches; see `Search`. Raises `UserError` for a mistake in the study or the launcher
    as a whole.
    """
    store = options.open_store()
    plan = make_plan(study, store, options.data)
    if not work_left(plan):
        return plan
    say("checking which methods support which backbones")
    plan = make_plan(study, store, options.data, ask_support=True)
    say("\n".join(describe(plan)))
    record_unsupported(plan, store)
    if not work_left(plan):
        return plan
    resolve = Resolver(store, options.data)
    with ExitStack() as stack:

        def open_searches(planned: list[PlannedSearch]) -> list[SearchTask]:
            opened = _searches(planned, store, resolve, storage)
            return [SearchTask(stack.enter_context(search), rows) for search, rows in opened]

        tasks = open_searches([*plan.heads, *plan.searches])
        launcher = stack.enter_context(choice.open())
        each = f", of up to {options.together} cells each" if options.together > 1 else ""
        say(f"{launcher.name}: {counted(launcher.slots, 'job')} at a time{each}")
        table = stack.enter_context(LiveTable(plan, store, quiet))
        Scheduler(launcher, options, resolve, plan.cells, tasks, table.update, open_searches).run()
    return plan


def _searches(
    searches: list[PlannedSearch], store: RunStore, resolve: Resolver, storage: str | None
) -> Iterator[tuple[Search, list[PlannedSearch]]]:
    """Each unfinished search that can start, with the rows that wait for it."""
    rows: dict[str, list[PlannedSearch]] = {}
    for planned in searches:
        if planned.folder is not None and not planned.finished:
            rows.setdefault(planned.folder.spec.name, []).append(planned)
    if not rows:
        return
    from studies.search.search import Search

    for planned, *others in rows.values():
        tune, sampler = planned.tune, planned.tune.sampler_of(planned.space)
        search = Search(
            planned.request, planned.space, planned.trials, store, resolve,
            sampler=sampler, pruner=tune.pruner, seeds=tune.seeds, storage=storage, warn=warn,
        )  # fmt: skip
        yield search, [planned, *others]


def record_unsupported(plan: Plan, store: RunStore) -> None:
    """Write run folders for unsupported cells, so that `list runs` and reports include them."""
    unrecorded = RunState.TO_DO, RunState.DAMAGED
    for cell in plan.cells:
        if cell.state is not RunState.UNSUPPORTED or cell.spec is None:
            continue
        if store.outcome(store.folder(cell.spec)).state in unrecorded:
            with suppress(AlreadyLocked):  # another process records it
                store.record(cell.spec, Outcome(RunState.UNSUPPORTED, cell.reason))
