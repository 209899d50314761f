"""The commands `compare` and `search`: parse, call, print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cells.request import Request
from harness.cli.ending import Stopped
from harness.cli.folders import check_writable
from harness.cli.options import Json, Quiet, Without, read_pairs, with_options
from harness.engine.options import ExecutionOptions
from harness.errors import UserError
from harness.launch.choice import LauncherChoice
from harness.runs.state import RunState
from harness.util.progress import say, warn
from harness.util.text import counted
from studies import shipped_studies

if TYPE_CHECKING:
    from harness.runs.store import RunStore
    from studies.plan import Plan

Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Optuna storage: database URL, or journal:FILE; default: SQLite under --runs"),
]
_REPLACES = "replaces the study's; repeatable"


@with_options(example="harness compare demo --jobs 2 --seeds 3")
def compare(
    study: Annotated[
        str, typer.Argument(metavar="STUDY", help=f"a .yaml file, or one that ships: {', '.join(shipped_studies())}")
    ],
    options: ExecutionOptions,
    launcher: LauncherChoice,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="a row's label, or a method; replaces the study's; repeatable"),
    ] = None,
    backbone: Annotated[list[str] | None, typer.Option(metavar="NAME", help=_REPLACES)] = None,
    dataset: Annotated[list[str] | None, typer.Option(metavar="NAME", help=_REPLACES)] = None,
    head: Annotated[list[str] | None, typer.Option(metavar="NAME", help=_REPLACES)] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=10_000, help="number of seeds; replaces the study's")] = None,
    budget: Annotated[str | None, typer.Option(help="replaces the study's")] = None,
    trials: Annotated[
        int | None, typer.Option(min=0, max=100_000, help="trials of each method's search; 0: no search")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="show the plan without running anything")] = False,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="a few steps of every distinct cell: does it work, how long, how much memory"),
    ] = False,
    storage: Storage = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run every cell of a study under one budget and print the table of scores.

    Finished runs are skipped and interrupted ones resumed. A failed cell does not stop the others; the exit code is 1
    if any cell failed.
    """
    from harness.cli.tables import print_table
    from studies import progress
    from studies.compare import compare as execute
    from studies.plan import make_plan
    from studies.replacements import Replacements
    from studies.study import load_study

    replacements = Replacements(
        tuple(method or ()), tuple(backbone or ()), tuple(dataset or ()), tuple(head or ()), seeds, budget, trials
    )
    chosen = load_study(study, replacements)
    if rehearse:
        if plan:
            raise UserError("--plan --rehearse: one at a time")
        raise typer.Exit(
            _rehearse(make_plan(chosen, options.open_store(), options.data, True), options, launcher, json_)
        )
    if plan:
        from studies.power import seeds_needed

        with _store_to_read(options.runs) as store:
            planned = make_plan(chosen, store, options.data, ask_support=True)
            lines = [*progress.describe(planned), *(f"  {one}" for one in seeds_needed(planned, store))]
        (say if json_ else print)("\n".join(lines))
    else:
        check_writable("--runs", options.runs)
        with _stoppable():
            planned = execute(chosen, options, replace(launcher, device=options.device), storage, quiet)
    if json_:
        print(json.dumps(progress.as_json(planned), indent=2))
    else:
        print_table(progress.table(planned))
        for note in progress.notes(planned) if not plan else ():
            print(note)
    if plan:
        good = not any(cell.spec is None and cell.state.failed for cell in planned.cells)
    else:
        good = all(cell.state in (RunState.DONE, RunState.UNSUPPORTED) for cell in planned.cells)
    raise typer.Exit(0 if good else 1)


@contextmanager
def _store_to_read(runs: Path) -> Iterator[RunStore]:
    """The runs under `runs`. Where that folder does not exist it is not created for what is cached."""
    from harness.runs.store import RunStore

    if runs.exists():
        yield RunStore(runs)
        return
    with TemporaryDirectory(prefix="harness-plan-") as cache:
        yield RunStore(runs, cache=Path(cache))


def _rehearse(planned: Plan, options: ExecutionOptions, launcher: LauncherChoice, json_: bool) -> int:
    """Print the table of `--rehearse`. Returns 1 if a cell fails."""
    from harness.cells.resolve import Resolver
    from harness.cli.tables import print_table
    from harness.launch.local import make_slots
    from harness.runs.store import RunStore
    from studies.rehearse import rehearse, total

    jobs = launcher.jobs or 1
    if launcher.name == "local":
        slots = make_slots(launcher.jobs, options.device)
        jobs, options = len(slots), replace(options, threads=slots[0].threads)
    rows = rehearse(planned, options, Resolver(RunStore(options.runs), options.data))
    if json_:
        print(json.dumps([row.as_json() for row in rows], indent=2))
    elif rows:
        print_table([row.line() for row in rows])
        print(total(rows, jobs))
    else:
        print("nothing is left to rehearse: every cell has ended")
    return 1 if any(row.reason is not None for row in rows) else 0


@with_options(example="harness search --method lora --parameters lr,rank --trials 30 --jobs 2")
def search(
    request: Annotated[Request, Without("part")],
    options: ExecutionOptions,
    launcher: LauncherChoice,
    parameters: Annotated[
        str | None,
        typer.Option(metavar="KEY,...", help="hyperparameters to search; default: all that declare a range"),
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=RANGE", help="LOW:HIGH, LOW:HIGH:log or A|B|C; replaces the declared range; repeatable"
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, max=100_000, help="total number of trials, with those of earlier commands")
    ] = 20,
    seeds: Annotated[
        int, typer.Option(min=1, max=10_000, help="runs of a trial, from --seed on; its value is their mean")
    ] = 1,
    sampler: Annotated[str, typer.Option(help="tpe, random, qmc, gp, cmaes, nsgaii or grid")] = "tpe",
    pruner: Annotated[
        str | None,
        typer.Option(help="median, hyperband or successive_halving, by train mIoU; default: no pruning"),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="such as miou, trained, memory, flops or delta; repeat for a Pareto front"),
    ] = None,
    storage: Storage = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Search a method's hyperparameters with Optuna, scored on the dev split. Each trial is a run.

    Repeat the command to resume an interrupted search, or to join one that other processes work on. With one trial at
    a time (--jobs 1, --together 1) a search is reproducible, also when it is interrupted.
    """
    from harness.cells.resolve import Resolver
    from harness.method import methods
    from studies.progress import LiveLine
    from studies.scheduler import Scheduler, SearchTask
    from studies.search.search import Search
    from studies.search.spec import make_space

    if request.seed + seeds > 2**31:
        raise UserError("the last seed is above 2147483647", field="seeds", value=seeds)
    names = None if parameters is None else [name.strip() for name in parameters.split(",") if name.strip()]
    ranges = make_space(methods.get(request.method), names, read_pairs(space or [], "--space"), request.settings)
    check_writable("--runs", options.runs)
    store = options.open_store()
    resolve = Resolver(store, options.data)
    with ExitStack() as stack:
        found = stack.enter_context(
            Search(
                replace(request, part="dev"),
                ranges,
                trials,
                store,
                resolve,
                sampler=sampler,
                pruner=pruner,
                objectives=tuple(objective or ["miou"]),
                seeds=tuple(range(request.seed, request.seed + seeds)),
                storage=storage,
                warn=warn,
            )
        )
        searched = ", ".join(f"{name}={range_}" for name, range_ in ranges.items())
        say(f"search {found.spec.name}: {counted(trials, 'trial')} of {found.spec.budget.steps} steps over {searched}")
        task = SearchTask(found)
        if not found.finished:
            opened = stack.enter_context(replace(launcher, device=options.device).open())
            task.jobs = opened.slots
            line = stack.enter_context(LiveLine(task, quiet))
            stack.enter_context(_stoppable())
            Scheduler(opened, options, resolve, [], [task], line.update).run()
    conclusion = task.conclusion or found.conclude()
    print(json.dumps(conclusion.as_json(), indent=2) if json_ else "\n".join(conclusion.lines()))
    raise typer.Exit(0 if any(trial.state == "complete" for trial in found.trials) else 1)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM: runs write their checkpoints at the latest while the launcher is closed."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped("stopped; run the command again to resume") from None
