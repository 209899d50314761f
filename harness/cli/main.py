"""The commands: parse, call, print. What they do is elsewhere, and is imported when a command runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import harness
from harness.cells.request import Request
from harness.cli.ending import ending, ending_as_recorded
from harness.cli.folders import check_writable
from harness.cli.options import Command, Group, Json, Only, Quiet, Without, given_fields, read_path, with_options
from harness.engine.options import ExecutionOptions
from harness.errors import UserError
from harness.util.option import environment_number
from harness.util.progress import say

app = typer.Typer(
    cls=Group,
    name="harness",
    help="Compares ways of tuning a frozen vision backbone for semantic segmentation: metrics and costs of each.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: importing rich would double the time that `--help` takes
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Run = Annotated[str, typer.Argument(help="run folder, the beginning of a fingerprint, or a delta.safetensors")]
MovedWeights = Annotated[str | None, typer.Option(help="backbone weights, if they have moved since the run read them")]


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


@app.command(cls=Command)
@with_options(example="harness run --method lora --backbone resnet50 --set lr=3e-4 --seed 1")
def run(
    context: typer.Context,
    request: Request,
    options: Annotated[ExecutionOptions, Without("time_limit", "together")],
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            parser=read_path,
            help="read the cell from a file (best.yaml of a search, spec.yaml of a run); flags override it",
        ),
    ] = None,
    quiet: Quiet = False,
    json_: Json = False,
    force: Annotated[bool, typer.Option("--force", help="rerun a finished run; its old folder is archived")] = False,
    again: Annotated[bool, typer.Option("--again", hidden=True)] = False,
) -> None:
    """Train and score one cell: a method, a backbone, a dataset, a head, a budget and a seed.

    Repeat the command to resume an interrupted run, or to print the result of a finished one.
    """
    from harness.cells.recipe import difference, located_in_recipe, read_recipe
    from harness.cells.resolve import resolve
    from harness.cli.listing import ListedRun, print_runs
    from harness.runs.store import RunStore

    store = RunStore(options.runs)
    if from_ is None:
        cell = resolve(request, store, options.data)
    else:
        flags = given_fields(context, "request", request)
        with located_in_recipe(from_, flags):
            cell = resolve(read_recipe(from_, flags), store, options.data)
        if text := difference(from_, cell.spec):
            say(f"warning: {from_}: {text}")
    folder = store.folder(cell.spec)
    _, result = store.read(folder)
    changed = None if result is None else folder.changed(result)
    if changed is not None:
        say(f"warning: {folder.path / changed} was changed or removed after the run ended; the run is executed again")
        force = True
    if force or again or result is None:
        check_writable("--runs", options.runs)
        with ending_as_recorded(store, folder):
            from harness.engine.run import execute

            execute(cell, options.open_store(), options, force=force or again, quiet=quiet)
    if environment_number("RANK", 0) == 0:
        listed = ListedRun.of(folder, store)
        if json_:
            _print_json(listed.as_json())
        else:
            print_runs([listed])
            print(folder.path)


@app.command(cls=Command)
@with_options(example="harness predict 3f2a photo1.jpg photo2.jpg --out predictions")
def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="image files, and folders with images at any depth")],
    options: Annotated[ExecutionOptions, Only("runs", "device", "plugins")],
    out: Annotated[
        Path, typer.Option(parser=read_path, metavar="FOLDER", help="folder for label maps and overlays")
    ] = Path("predictions"),
    weights: MovedWeights = None,
    window: Annotated[
        int | None,
        typer.Option(min=32, metavar="PIXELS", help="predict squares of this size one at a time, for large images"),
    ] = None,
    codes: Annotated[
        bool,
        typer.Option("--codes", help="write the values of the dataset's masks, such as 10 and 20, not class indices"),
    ] = False,
    json_: Json = False,
) -> None:
    """Predict images with a finished run: write label maps and coloured overlays.

    The label map of a GeoTIFF is a GeoTIFF. Images are read as in training, also those of 16 bits or many bands.
    Only files that an earlier `predict` wrote are overwritten. An image that cannot be read does not stop the others;
    the exit code is then 1.
    """
    check_writable("--out", out)
    from harness.deploy.predict import Failed, Remark, predict_images
    from harness.runs.store import RunStore

    failed: list[Failed] = []
    written: list[Path] = []
    remarks: dict[str, list[Path]] = {}
    for found in predict_images(RunStore(options.runs), run, images, out, weights, options.device, window, codes):
        if isinstance(found, Failed):
            failed.append(found)
        elif isinstance(found, Remark):
            remarks.setdefault(found.text, []).append(found.image)
        else:
            written.append(found)
            if not json_:
                print(found)
    if json_:
        errors = [{"image": str(one.image), "reason": one.reason} for one in failed]
        warnings = [{"reason": text, "images": list(map(str, paths))} for text, paths in remarks.items()]
        _print_json({"written": list(map(str, written)), "failed": errors, "warnings": warnings})
    for text, (first, *others) in remarks.items():
        say(f"warning: {first}{f' and {len(others)} more' if others else ''}: {text}")
    for one in failed:
        say(f"error: {one.image}: {one.reason}")
    raise typer.Exit(1 if failed else 0)


@app.command(cls=Command)
@with_options(example="harness export 3f2a --merge --format onnx --out exported")
def export(
    run: Run,
    options: Annotated[ExecutionOptions, Only("runs", "plugins")],
    out: Annotated[Path, typer.Option(parser=read_path, metavar="FOLDER", help="folder to write to")] = Path(
        "exported"
    ),
    format: Annotated[
        Literal["safetensors", "torchscript", "onnx"], typer.Option(help="a state dict (safetensors) or a program")
    ] = "safetensors",
    merge: Annotated[bool, typer.Option("--merge", help="merge the method into the backbone's own layers")] = False,
    weights: MovedWeights = None,
    json_: Json = False,
) -> None:
    """Export the adapted network of a finished run, with a JSON file that describes its input and output."""
    check_writable("--out", out)
    from harness.deploy.export import export as write
    from harness.runs.store import RunStore

    written = [str(path) for path in write(RunStore(options.runs), run, out, format, merge, weights)]
    _show(json_, {"written": written}, lambda: print("\n".join(written)))


@app.command("list", cls=Command)
@with_options(
    example='harness list backbones "*resnet*" --pretrained',
)
def list_(
    what: Annotated[
        Literal["methods", "backbones", "datasets", "heads", "budgets", "runs"], typer.Argument(help="what to list")
    ],
    options: Annotated[ExecutionOptions, Only("runs", "data", "plugins")],
    pattern: Annotated[
        str | None,
        typer.Argument(help="names that match, such as '*resnet*'; of runs also state, method, backbone, dataset"),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="backbones whose pre-trained weights are on this machine")
    ] = False,
    json_: Json = False,
) -> None:
    """List what can be run, or the runs. A method's name shows its hyperparameters."""
    from harness.cli import listing
    from harness.runs.store import RunStore

    if pretrained and what != "backbones":
        raise UserError(f"list {what} --pretrained: only backbones have pre-trained weights; omit the flag")
    if what == "runs":
        runs = listing.list_runs(RunStore(options.runs), pattern)
        _show(json_, [run.as_json() for run in runs], lambda: listing.print_runs(runs))
    else:
        rows = listing.list_rows(what, options.data, pattern, pretrained)
        _show(json_, rows, lambda: listing.print_rows(what, rows, pattern))


@app.command(cls=Command)
@with_options(example="harness check spm lora street/dataset.yaml")
def check(
    options: Annotated[ExecutionOptions, Only("runs", "plugins")],
    names: Annotated[
        list[str] | None,
        typer.Argument(help="methods, see `harness list methods`; or a dataset's YAML file or folder"),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="every method")] = False,
    json_: Json = False,
    sheet: Annotated[
        Path | None,
        typer.Option(parser=read_path, metavar="FILE.png", help="of a dataset: write images with their labels"),
    ] = None,
) -> None:
    """Check a method against the contract, on one tiny network of every backbone family; or a dataset's files.

    Of a dataset it prints sizes, groups, the share of each class in each split, and warnings.
    """
    if bool(names) == all_:
        raise UserError("check: pass the names of methods, or --all, or the path of a dataset")
    from harness.cli.check_dataset import check_datasets, is_dataset

    paths = [name for name in names or [] if is_dataset(name)]
    if paths:
        if len(paths) < len(names or []):
            raise UserError("check: methods and datasets in one command; check one after the other")
        from harness.runs.store import RunStore

        raise typer.Exit(check_datasets(paths, RunStore(options.runs).cache, json_, sheet))
    if sheet is not None:
        raise UserError("check --sheet: is for datasets; name one, or omit the flag")
    from harness.contract.matrix import run_check
    from harness.method import methods

    raise typer.Exit(run_check(methods.names() if all_ else names or [], json_))


@app.command("new-method", cls=Command)
@with_options(example="harness new-method my_adapter")
def new_method(
    name: Annotated[str, typer.Argument(help="lower_case_with_underscores")],
    options: Annotated[ExecutionOptions, Only("plugins")],
    json_: Json = False,
) -> None:
    """Write a plugin package with a small method into the current folder; it passes `harness check` as it is."""
    check_writable("new-method: folder", Path.cwd())
    from harness.contract.new_method import new_method as write_method

    folder = str(write_method(name, Path.cwd()))
    _show(json_, {"written": [folder]}, lambda: print(folder))


@app.command("new-dataset", cls=Command)
@with_options(example="harness new-dataset street")
def new_dataset(
    path: Annotated[Path, typer.Argument(parser=read_path, help="folder of images and masks, in any usual layout")],
    out: Annotated[
        Path | None,
        typer.Option(parser=read_path, metavar="FILE.yaml", help="file to write; default: dataset.yaml in the folder"),
    ] = None,
    json_: Json = False,
) -> None:
    """Write a dataset.yaml from what a folder's files look like, for you to confirm. Overwrites nothing."""
    from harness.cli.new_dataset import new_dataset as write_description

    write_description(path, out, json_)


@app.command(cls=Command)
@with_options(example="harness sync --tracking http://mlflow.example.org:5000")
def sync(options: Annotated[ExecutionOptions, Only("runs", "tracking")], json_: Json = False) -> None:
    """Update MLflow from the run folders, for example after its server was down."""
    from harness.tracking.mirror import sync as sync_runs

    summary = sync_runs(options.runs, options.tracking)
    counts = f"{summary.mirrored} mirrored, {summary.current} up to date, {len(summary.failed)} failed"
    failed = [f"  {name}: {reason}" for name, reason in summary.failed.items()]
    _show(json_, asdict(summary), lambda: print("\n".join([counts, *failed])))
    raise typer.Exit(1 if summary.failed else 0)


@app.command(cls=Command)
@with_options(example="harness ui --port 5001")
def ui(
    options: Annotated[ExecutionOptions, Only("runs", "tracking")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on")] = 5000,
) -> None:
    """Serve MLflow's pages for the local runs. Ctrl-C stops it."""
    from harness.tracking.mirror import ui as serve

    raise typer.Exit(serve(options.runs, options.tracking, host, port))


@app.command(cls=Command)
@with_options(example="harness doctor --data ~/datasets")
def doctor(options: Annotated[ExecutionOptions, Only("runs", "data")], json_: Json = False) -> None:
    """Check what is installed, which weights and datasets are available, and how to get the rest. Changes nothing."""
    from harness.cli.doctor import examine, print_findings

    findings = examine(options.runs, options.data)
    _show(json_, findings, lambda: print_findings(findings))
    raise typer.Exit(1 if any(finding["state"] == "broken" for finding in findings) else 0)


def _show(as_json: bool, value: Any, show: Callable[[], None]) -> None:
    if as_json:
        _print_json(value)
    else:
        show()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


@functools.cache
def _add_commands() -> None:
    """Add the commands of packages that build on this one; they declare them as entry points."""
    for point in sorted(set(entry_points(group="harness.commands")), key=lambda point: point.name):
        app.command(point.name, cls=Command)(point.load())


def main() -> None:
    """The entry point; how it ends is in `ending.py`."""
    with ending():
        _add_commands()
        app(prog_name="harness", standalone_mode=True)
