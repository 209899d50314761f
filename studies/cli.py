"""The commands `compare` and `search`: parse, call, print."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.main import CacheSize, Data, Json, Plugin, Runs, Tracking, print_table, settings_of
from harness.errors import UserError
from harness.util.progress import say, warn
from harness.util.sizes import CACHE_SIZE, parse_size


class LauncherName(enum.StrEnum):
    local = "local"
    ray = "ray"
    slurm = "slurm"


Launcher = Annotated[LauncherName, typer.Option("--launcher", help="where cells are executed")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="cells at once; default one a GPU, or one with all cores"),
]
LauncherSettings = Annotated[
    list[str] | None,
    typer.Option("--launcher-set", metavar="KEY=VALUE", help="an option of the launcher; repeatable"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Workers = Annotated[int | None, typer.Option(min=0, help="data-loading processes of a cell; default by cores")]
TimeLimit = Annotated[float | None, typer.Option("--time-limit", min=0, help="most minutes that one cell may take")]
Storage = Annotated[
    str | None,
    typer.Option(help="Optuna storage: URL of a database, or journal:FILE; default SQLite under --runs"),
]
Together = Annotated[
    int,
    typer.Option(
        min=1,
        help="cells, or trials of a search, of the same images that one process trains at once; no figure depends on "
        "it, nor do the trials of grid, random and qmc, nor tpe's first 10",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="plain lines in place of a live table")]
CheckpointSeconds = Annotated[float, typer.Option(min=0, help="least time between checkpoints", hidden=True)]


def compare(
    study: Annotated[
        str,
        typer.Argument(metavar="STUDY", help="a file, or demo, tradeoff, paper, spm_ablation"),
    ],
    method: Annotated[list[str] | None, typer.Option(help="in place of the study's; repeatable")] = None,
    backbone: Annotated[list[str] | None, typer.Option(help="in place of the study's; repeatable")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="in place of the study's; repeatable")] = None,
    head: Annotated[list[str] | None, typer.Option(help="in place of the study's; repeatable")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="how many, in place of the study's")] = None,
    budget: Annotated[str | None, typer.Option(help="in place of the study's")] = None,
    trials: Annotated[int | None, typer.Option(min=0, help="of every method's search; 0: none")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="show what there is to do, and do nothing")] = False,
    launcher: Launcher = LauncherName.local,
    jobs: Jobs = None,
    launcher_settings: LauncherSettings = None,
    device: Device = "auto",
    workers: Workers = None,
    time_limit: TimeLimit = None,
    together: Together = 1,
    cache_size: CacheSize = CACHE_SIZE,
    storage: Storage = None,
    runs: Runs = Path("runs"),
    data: Data = Path("data"),
    tracking: Tracking = None,
    quiet: Quiet = False,
    json_: Json = False,
    plugin: Plugin = None,
    checkpoint_seconds: CheckpointSeconds = 30,
) -> None:
    """Run every cell of a grid under one budget: what is done is skipped, what was interrupted is gone on with.

    One bad cell stops nothing; the exit code is 1 if any cell has failed in the end.
    """
    from studies import compare as comparing
    from studies.plan import make_plan
    from studies.study import Replacements, load_study

    options = _options(runs, data, tracking, workers, time_limit, checkpoint_seconds, together, cache_size)
    chosen = load_study(
        study,
        Replacements(*(tuple(names or ()) for names in (method, backbone, dataset, head)), seeds, budget, trials),
    )
    if plan:
        planned = make_plan(chosen, options.open_store(), data, ask_support=True)
        show = print if not json_ else say
        show("\n".join(comparing.describe(planned)))
    else:
        choice = _choice(launcher, jobs, device, launcher_settings)
        with _stoppable():
            planned = comparing.compare(chosen, options, choice, storage, quiet)
    if json_:
        print(json.dumps(comparing.as_json(planned), indent=2))
    else:
        print_table(comparing.table(planned))
        for note in comparing.notes(planned) if not plan else ():
            print(note)
    if not plan:
        raise typer.Exit(0 if all(cell.state in ("done", "unsupported") for cell in planned.cells) else 1)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM: what runs has written checkpoints by now, or does so while the launcher is closed."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        raise typer.Exit(130) from None


def _choice(launcher: LauncherName, jobs: int | None, device: str, settings: list[str] | None):
    from harness.launch.launcher import LauncherChoice

    return LauncherChoice(launcher.value, jobs, device, settings_of(settings or [], "--launcher-set"))


def _options(
    runs: Path,
    data: Path,
    tracking: str | None,
    workers: int | None,
    minutes: float | None,
    checkpoint_seconds: float,
    together: int,
    cache_size: str,
):
    from harness.engine.options import ExecutionOptions

    if minutes is not None and minutes <= 0:
        raise UserError(f"--time-limit {minutes:g}: give minutes above 0")
    return ExecutionOptions(
        runs=runs,
        data=data,
        tracking=tracking,
        workers=workers,
        time_limit=minutes,
        checkpoint_seconds=checkpoint_seconds,
        together=together,
        cache_size=parse_size(cache_size, "--cache-size"),
    )


def search(
    method: Annotated[
        str, typer.Option(help="tuning method; `harness list methods` shows the ranges it declares")
    ] = "spm",
    backbone: Annotated[str, typer.Option(help="timm name, such as resnet101")] = "tf_efficientnet_lite0",
    dataset: Annotated[str, typer.Option(help="name, or a folder or .yaml of your own")] = "landcover",
    head: Annotated[str, typer.Option(help="decode head, NAME or NAME:WIDTH")] = "fpn",
    budget: Annotated[str, typer.Option(help="of every trial: name, or a .yaml file")] = "demo",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the trials and of the sampler")] = 0,
    weights: Annotated[str, typer.Option(help="auto, random, or a .safetensors or .pth file")] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a hyperparameter that is kept; repeatable")
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="which to search, such as lr,hidden; default all with a declared range")
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=RANGE", help="LOW:HIGH, LOW:HIGH:log or A|B|C over the declared range; repeatable"),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="in all, those of earlier commands included")] = 20,
    sampler: Annotated[str, typer.Option(help="tpe, random, qmc, gp, cmaes, nsgaii or grid")] = "tpe",
    pruner: Annotated[
        str | None,
        typer.Option(help="median, hyperband or successive_halving; by the training crops' mIoU; default none"),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(help="miou, trained, memory, flops or delta; repeatable: several give a Pareto front"),
    ] = None,
    launcher: Launcher = LauncherName.local,
    jobs: Jobs = None,
    launcher_settings: LauncherSettings = None,
    device: Device = "auto",
    workers: Workers = None,
    time_limit: TimeLimit = None,
    together: Together = 1,
    cache_size: CacheSize = CACHE_SIZE,
    storage: Storage = None,
    runs: Runs = Path("runs"),
    data: Data = Path("data"),
    tracking: Tracking = None,
    quiet: Quiet = False,
    plugin: Plugin = None,
    checkpoint_seconds: CheckpointSeconds = 30,
) -> None:
    """Search a method's hyperparameters on a dev part of train, with Optuna. Each trial is an ordinary run.

    The same command goes on with an interrupted search, and joins one that other processes work on. With one trial at a
    time (--jobs 1, --together 1) a search is reproducible, whatever interrupts it.
    """
    from harness.cells.resolve import Request, Resolver
    from harness.method import methods
    from studies.compare import LiveLine
    from studies.scheduler import Scheduler, SearchTask
    from studies.search.search import Search
    from studies.search.spec import make_space

    options = _options(runs, data, tracking, workers, time_limit, checkpoint_seconds, together, cache_size)
    fixed = settings_of(settings or [])
    request = Request(method, backbone, weights, dataset, head, budget, seed, "dev", dict(fixed))
    names = None if parameters is None else [name.strip() for name in parameters.split(",") if name.strip()]
    ranges = make_space(methods.get(method), names, settings_of(space or [], "--space"), fixed)
    store = options.open_store()
    resolve = Resolver(store, data)
    with ExitStack() as held:
        found = held.enter_context(
            Search(
                request,
                ranges,
                trials,
                store,
                resolve,
                sampler=sampler,
                pruner=pruner,
                objectives=tuple(objective or ["miou"]),
                storage=storage,
                warn=warn,
            )
        )
        say(f"search {found.spec.name}: {trials} trials of {found.spec.budget.steps} steps over "
             + ", ".join(f"{name}={range_}" for name, range_ in ranges.items()))  # fmt: skip
        task = SearchTask(found)
        if not found.finished:
            at_once = held.enter_context(_choice(launcher, jobs, device, launcher_settings).open())
            task.jobs = at_once.slots
            line = held.enter_context(LiveLine(task, quiet))
            held.enter_context(_stoppable())
            Scheduler(at_once, options, resolve, [], [task], line.update).run()
    for text in (task.conclusion or found.conclude()).lines():
        print(text)
    raise typer.Exit(0 if any(trial.state == "complete" for trial in found.trials) else 1)
