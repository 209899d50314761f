"""The commands: parse, call, print. What they do is elsewhere, and is imported when a command runs."""

from __future__ import annotations

import enum
import functools
import json
import os
import signal
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

import harness
from harness.errors import UserError
from harness.util.files import is_disk_full
from harness.util.sizes import CACHE_SIZE, parse_size

app = typer.Typer(
    name="harness",
    help="Which way of tuning a frozen vision backbone is worth its parameters for semantic segmentation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _load_plugins(files: list[Path] | None) -> list[Path] | None:
    if files or os.environ.get("HARNESS_PLUGINS"):
        from harness.cells import plugins

        plugins.load(files or [])
    return files


Plugin = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin", metavar="FILE", callback=_load_plugins, help="a .py file that defines a method; repeatable"
    ),
]
Runs = Annotated[Path, typer.Option("--runs", envvar="HARNESS_RUNS", help="folder of the run folders")]
Data = Annotated[Path, typer.Option("--data", envvar="HARNESS_DATA", help="folder of the datasets")]
Tracking = Annotated[
    str | None,
    typer.Option("--tracking", envvar="MLFLOW_TRACKING_URI", help="MLflow store; default SQLite under --runs; or off"),
]
CacheSize = Annotated[
    str,
    typer.Option(
        "--cache-size",
        envvar="HARNESS_CACHE_SIZE",
        metavar="SIZE",
        help="disk under --runs for what frozen backbones compute, such as 500MB or 20GiB; 0: none",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


class What(enum.StrEnum):
    """What `harness list` can list."""

    methods = "methods"
    backbones = "backbones"
    datasets = "datasets"
    heads = "heads"
    budgets = "budgets"
    runs = "runs"


class PartChoice(enum.StrEnum):
    report = "report"
    dev = "dev"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"harness {harness.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    context: typer.Context,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="a cell in a file (a search's best.yaml, a run's spec.yaml); flags go over it",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="tuning method; `harness list methods`")] = "spm",
    backbone: Annotated[str, typer.Option(help="timm name, such as resnet101")] = "tf_efficientnet_lite0",
    dataset: Annotated[str, typer.Option(help="name, or a folder or .yaml of your own")] = "landcover",
    head: Annotated[str, typer.Option(help="decode head, NAME or NAME:WIDTH")] = "fpn",
    budget: Annotated[str, typer.Option(help="name, or a .yaml file")] = "demo",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of initialisation, data order, augmentation")] = 0,
    weights: Annotated[str, typer.Option(help="auto, random, package:NAME, or a .safetensors or .pth file")] = "auto",
    part: Annotated[
        PartChoice,
        typer.Option(help="report: train on train, score on test; dev: hold a part of train out, score it"),
    ] = PartChoice.report,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a hyperparameter; repeatable")
    ] = None,
    runs: Runs = Path("runs"),
    data: Data = Path("data"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help="data-loading processes; default by cores")] = None,
    tracking: Tracking = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="plain lines in place of a progress bar")] = False,
    again: Annotated[bool, typer.Option("--again", help="do a finished run afresh; the old one is set aside")] = False,
    cache_size: CacheSize = CACHE_SIZE,
    plugin: Plugin = None,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="least time between checkpoints", hidden=True)] = 30,
) -> None:
    """Adapt one backbone to one dataset with one method under one budget, and report what it reached and cost.

    The same command goes on where an interrupted run stopped, and prints the result of a finished one.
    """
    from harness.cells.recipe import difference, located_in_recipe, read_recipe
    from harness.cells.resolve import Request, resolve
    from harness.engine.options import ExecutionOptions

    options = ExecutionOptions(
        runs=runs,
        data=data,
        device=device,
        workers=workers,
        tracking=tracking,
        cache_size=parse_size(cache_size, "--cache-size"),
        checkpoint_seconds=checkpoint_seconds,
    )
    store = options.open_store()
    values = {
        "method": method, "backbone": backbone, "weights": weights, "dataset": dataset, "head": head,
        "budget": budget, "seed": seed, "part": part.value, "settings": settings_of(settings or []),
    }  # fmt: skip
    if from_ is None:
        cell = resolve(Request(**values), store, data)
    else:
        given = [name for name in values if context.get_parameter_source(name).name != "DEFAULT"]
        flags = {name: values[name] for name in given}
        with located_in_recipe(from_, flags):
            cell = resolve(read_recipe(from_, flags), store, data)
        if text := difference(from_, cell.spec):
            print(f"warning: {from_}: {text}", file=sys.stderr)
    folder = store.folder(cell.spec)
    if again or folder.result() is None:
        from harness.engine.run import execute

        execute(cell, store, options, force=again, quiet=quiet)
    if int(os.environ.get("RANK", "0")) == 0:
        result = folder.result()
        assert result is not None
        print_table([_row(folder.fingerprint, result.model_dump(mode="json"))])
        print(folder.path)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="run folder, the beginning of its name, or a delta.safetensors")],
    images: Annotated[list[Path], typer.Argument(help="image files")],
    out: Annotated[Path, typer.Option(help="folder for the label maps and overlays")] = Path("predictions"),
    weights: Annotated[
        str | None, typer.Option(help="where the backbone's weights are; default: where the run had them")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    runs: Runs = Path("runs"),
    plugin: Plugin = None,
) -> None:
    """Rebuild the network from public backbone and delta; write label maps and coloured overlays."""
    from harness.deploy.predict import predict_images
    from harness.runs.store import RunStore

    for written in predict_images(RunStore(runs), run, images, out, weights, device):
        print(written)


class FormatChoice(enum.StrEnum):
    safetensors = "safetensors"
    torchscript = "torchscript"
    onnx = "onnx"


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="run folder, the beginning of its name, or a delta.safetensors")],
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("exported"),
    format: Annotated[FormatChoice, typer.Option(help="a plain state dict, or a program")] = FormatChoice.safetensors,
    merge: Annotated[bool, typer.Option("--merge", help="fold the method into the backbone's own layers")] = False,
    weights: Annotated[
        str | None, typer.Option(help="where the backbone's weights are; default: where the run had them")
    ] = None,
    runs: Runs = Path("runs"),
    plugin: Plugin = None,
) -> None:
    """Write the adapted network for use elsewhere, with a small recipe of how to load and feed it."""
    from harness.deploy.export import export as write
    from harness.runs.store import RunStore

    for written in write(RunStore(runs), run, out, format.value, merge, weights):
        print(written)


@app.command("list")
def list_(
    what: What,
    json_: Json = False,
    runs: Runs = Path("runs"),
    data: Data = Path("data"),
    plugin: Plugin = None,
) -> None:
    """List what can be run, or what was."""
    from harness.cli import listing

    rows = listing.rows(what.value, runs, data)
    if json_:
        print(json.dumps(rows, indent=2))
    elif what is What.runs:
        print_table([_row(row["fingerprint"], row) for row in rows])
    elif what is What.methods:
        for row in rows:
            print(f"{row['name']}: {row['summary']}\n  {row['source']}")
            print_table([_knob(described) for described in row["hyperparameters"]], indent="  ")
    else:
        print_table([{key: _plain(value) for key, value in row.items()} for row in rows])


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="methods; `harness list methods`")] = None,
    all_: Annotated[bool, typer.Option("--all", help="every method")] = False,
    json_: Json = False,
    plugin: Plugin = None,
) -> None:
    """Check that a method keeps the contract, on one tiny network of every family."""
    if bool(names) == all_:
        raise UserError("check: give the names of methods, or --all")
    from harness.contract.matrix import run_check
    from harness.method import methods

    raise typer.Exit(run_check(methods.names() if all_ else names or [], json_))


@app.command("new-method")
def new_method(name: Annotated[str, typer.Argument(help="lower_case_with_underscores")], plugin: Plugin = None) -> None:
    """Write a plugin package with one small method into the current folder; it passes `harness check` as generated."""
    from harness.cells import plugins

    print(plugins.new_method(name, Path.cwd()))


@app.command()
def sync(runs: Runs = Path("runs"), tracking: Tracking = None) -> None:
    """Bring MLflow up to date with the run folders, after a tracking server was away."""
    from harness.tracking.mirror import sync as sync_runs

    summary = sync_runs(runs, tracking)
    print(f"{summary.mirrored} mirrored, {summary.current} up to date, {len(summary.failed)} failed")
    for name, reason in summary.failed.items():
        print(f"  {name}: {reason}")
    raise typer.Exit(1 if summary.failed else 0)


@app.command()
def ui(
    runs: Runs = Path("runs"),
    tracking: Tracking = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on")] = 5000,
) -> None:
    """MLflow's own pages on the local store. Ctrl-C ends it."""
    from harness.tracking.mirror import ui as serve

    raise typer.Exit(serve(runs, tracking, host, port))


@app.command()
def doctor(runs: Runs = Path("runs"), data: Data = Path("data"), json_: Json = False) -> None:
    """What is installed, which weights and datasets are reachable, and what to do about the rest."""
    from harness.cli.doctor import examine

    findings = examine(runs, data)
    if json_:
        print(json.dumps(findings, indent=2))
    else:
        print_table(findings)
    raise typer.Exit(1 if any(finding["state"] == "broken" for finding in findings) else 0)


def settings_of(pairs: list[str], flag: str = "--set") -> dict[str, str]:
    """KEY=VALUE pairs of a repeatable flag. Raises `UserError`."""
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"{flag} {pair}: expected KEY=VALUE")
        if key in settings:
            raise UserError(f"{flag} {pair}: {key} is set twice")
        settings[key] = value
    return settings


def _row(fingerprint: str, result: dict[str, Any]) -> dict[str, str]:
    """One line of the table of runs: what was run, what it reached and what it cost, or why there is no figure."""
    from harness.models.backbones.packaged import display_name

    spec, done = result["spec"], result["status"] == "done"
    figures = {"mIoU": "-", "trainable": "-", "of it method": "-", "delta": "-", "seconds": "-"}
    if done:
        counts = result["parameters"]
        miou = result["metrics"]["miou"]
        figures = {
            "mIoU": "-" if miou is None else f"{miou:.4f}",
            "trainable": f"{counts['trainable']:,}",
            "of it method": f"{counts['method']:,}",
            "delta": f"{result['delta_bytes'] / 2**20:.2f} MiB",
            "seconds": f"{result['train_seconds']:.0f}",
        }
    row = {
        "run": fingerprint,
        "method": spec["method"] + _changes(spec),
        "backbone": display_name(spec["backbone"], spec["weights"]),
        "dataset": spec["dataset"] + ("" if spec["part"] == "report" else " (dev)"),
        "head": spec["head"],
        "budget": spec["budget"]["name"],
        "seed": str(spec["seed"]),
        **figures,
    }
    state = "done" if done else f"{result['status']}: {result['reason']}" if result.get("reason") else result["status"]
    return {**row, "state": state}


def _changes(spec: dict[str, Any]) -> str:
    """The hyperparameters that differ from the method's defaults, so that two rows of one method can be told apart."""
    from harness.method import methods

    try:
        fields = methods.get(spec["method"]).Hyperparameters.model_fields
    except UserError:
        return ""
    changed = [
        f"{name}={value}"
        for name, value in spec["hyperparameters"].items()
        if name not in fields or fields[name].default != value
    ]
    return f"({', '.join(changed)})" if changed else ""


def _knob(described: dict[str, Any]) -> dict[str, str]:
    """One line of a method's hyperparameters, as `--set` takes them."""
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "pattern": "~"}
    bounds = [f"{signs.get(key, key)} {_plain(value)}" for key, value in described["bounds"].items()]
    return {
        "--set": described["name"],
        "default": _plain(described["default"]),
        "type": described["type"],
        "bounds": ", ".join(bounds),
        "search": _plain(described["search"]),
        "help": described["help"],
    }


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def print_table(rows: list[dict[str, str]], indent: str = "") -> None:
    """Aligned columns; numbers to the right. Nothing is cut, whatever the terminal's width."""
    if not rows:
        print("none")
        return
    columns = list(rows[0])
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    right = {column for column in columns if all(row[column][:1] in "0123456789-" for row in rows)} - {"run", "state"}

    def line(cells: dict[str, str]) -> str:
        parts = [
            cells[c].rjust(widths[c]) if c in right else cells[c].ljust(widths[c]) for c in columns
        ]  # fmt: skip
        return indent + "  ".join(parts).rstrip()

    print(line({column: column for column in columns}))
    for row in rows:
        print(line(row))


@functools.cache
def _add_commands() -> None:
    """The commands of the packages that build on this one, which it knows only by the entry points they declare."""
    for point in sorted(set(entry_points(group="harness.commands")), key=lambda point: point.name):
        app.command(point.name)(point.load())


def main() -> None:
    """The entry point: what a user can mend is one line and exit code 2, a failed run 1, Ctrl-C and SIGTERM 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _add_commands()
        app(prog_name="harness", standalone_mode=True)
    except UserError as error:
        print(f"error: {error.for_command_line()}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if is_disk_full(error):
            print(f"error: {error.filename or 'the disk'}: {error.strerror}; make room and repeat", file=sys.stderr)
            sys.exit(2)
        code = _ended_early(error)
        if code is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


def _ended_early(error: Exception) -> int | None:
    """The exit code of a run that ended without a result; None for a bug, whose traceback is wanted."""
    if "harness.runs.state" not in sys.modules:
        return None
    from harness.runs.state import RunEnded, RunState

    if not isinstance(error, RunEnded):
        return None
    return 130 if error.outcome.state is RunState.INTERRUPTED else 1
