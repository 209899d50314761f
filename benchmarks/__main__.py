"""Measures the harness's own cost in one process, and prints tables of ratios.

Measurements alternate, so that ratios are valid on a busy machine: medians over rounds, with the range of their middle
half in brackets. Weights are random by default: the cost of a step does not depend on them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import chosen, write
from harness.errors import UserError

if TYPE_CHECKING:
    from benchmarks.measure import Table
    from benchmarks.setting import Setting

TABLES = ("loops", "methods", "shapes", "sharing", "step")
OPTIONS = ("channels-last", "bf16", "both", "compile")


def main(arguments: Sequence[str] | None = None) -> int:
    # Read when torch is imported: silences its profiler.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        _measure(_parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--backbone", nargs="+", default=["tf_efficientnet_lite0"], metavar="NAME", help="timm names")
    add("--head", default="fpn:64", help="NAME or NAME:WIDTH (default %(default)s)")
    add("--weights", default="random", help="random, auto or a file (default %(default)s)")
    add("--dataset", default="landcover", help="name or folder (default %(default)s)")
    add("--data", type=Path, default=Path("data"), help="folder of the datasets (default %(default)s)")
    add("--crop", type=int, default=96, help="side of a training crop, pixels (default %(default)s)")
    add(
        "--contiguous",
        action="store_true",
        help="contiguous maps, not channels-last as in the shipped budgets",
    )
    add("--batch", type=int, default=8, help="images per step (default %(default)s)")
    add("--steps", type=int, default=60, help="steps of one timed loop or run (default %(default)s)")
    add("--rounds", type=int, default=5, help="number of measurements (default %(default)s)")
    add("--only", metavar="A,B", help=f"tables, of {', '.join(TABLES)} (default all)")
    add("--methods", metavar="A,B", help="for the tables of loops, methods and step (default: each table's own)")
    add("--trials", type=int, default=16, help="runs side by side (default %(default)s)")
    add("--options", metavar="A,B", help=f"of a step, of {', '.join(OPTIONS)} (default all)")
    add("--workers", type=int, help="loader processes (default as `harness run`)")
    add("--threads", type=int, help="torch's threads in this process (default torch's own number)")
    add(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="wall, or process: CPU seconds of this process only",
    )
    add("--markdown", type=Path, metavar="FILE", help="write the tables there as well")
    return parser


def _measure(options: argparse.Namespace) -> None:
    from harness.method import methods
    from harness.spec import budget_from

    tables = chosen("--only", options.only, TABLES) or TABLES
    named = chosen("--methods", options.methods, methods.names())
    step_options = chosen("--options", options.options, OPTIONS) or OPTIONS
    for flag in ("rounds", "trials", "threads"):
        if (value := getattr(options, flag)) is not None and value < 1:
            raise UserError(f"--{flag} {value}: use 1 or more")
    size = {"steps": options.steps, "batch_size": options.batch, "crop": [options.crop, options.crop]}
    layout = {"channels_last": not options.contiguous}
    budget = budget_from(size | layout, "benchmark")

    import torch

    from benchmarks import machine
    from benchmarks.measure import Clock
    from benchmarks.setting import Setting
    from harness.engine.device import default_workers, make_fabric, make_reproducible

    if options.threads:
        torch.set_num_threads(options.threads)
    make_reproducible()
    fabric = make_fabric("auto", budget.precision)
    if options.clock == "process" and fabric.device.type != "cpu":
        raise UserError("--clock process: does not measure a GPU; use wall")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        setting = Setting(
            dataset=options.dataset,
            head=options.head,
            weights=options.weights,
            budget=budget,
            rounds=options.rounds,
            workers=default_workers(None) if options.workers is None else options.workers,
            data=options.data,
            scratch=Path(scratch),
            fabric=fabric,
            clock=Clock(fabric.device, of_process=options.clock == "process"),
        )
        for backbone in options.backbone:  # unknown names are reported before anything is measured
            setting.cell(backbone, "full")
        written = [machine.line(fabric.device), _conditions(options)]
        print("\n\n".join(written), flush=True)
        for table in _tables(setting, tables, options.backbone, named, options.trials, step_options):
            written.append(str(table))
            print(f"\n{table}", flush=True)
            if options.markdown:
                write(options.markdown, "\n\n".join(written) + "\n")


def _tables(
    setting: Setting,
    tables: Sequence[str],
    backbones: Sequence[str],
    named: Sequence[str],
    trials: int,
    step_options: Sequence[str],
) -> Iterator[Table]:
    """The tables, one at a time, as they are measured. `named`: methods; empty: each table's own."""
    from benchmarks import costs, loops, options, shapes, sharing
    from harness.method import methods

    if "loops" in tables:
        yield loops.table(setting, backbones, named or loops.METHODS)
    if "methods" in tables:
        for backbone in backbones:
            yield costs.table(setting, backbone, named or methods.names())
    if "shapes" in tables:
        for backbone in backbones:
            yield shapes.table(setting, backbone, named or methods.names())
    if "sharing" in tables:
        yield sharing.table(setting, backbones, trials)
    if "step" in tables:
        yield options.table(setting, backbones, named or options.METHODS, step_options)


def _conditions(options: argparse.Namespace) -> str:
    return (
        f"Head {options.head}, crops of {options.crop}, {options.batch} images per step, "
        f"{'contiguous' if options.contiguous else 'channels-last'}, weights {options.weights}, data "
        f"{Path(options.dataset).name}. Ratios of {options.clock} time: the median over rounds, and the range of their "
        "middle half."
    )


if __name__ == "__main__":
    sys.exit(main())
