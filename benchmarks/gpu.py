"""One command for a machine with a GPU, in minutes and without a network: `python -m benchmarks.gpu`.

It checks on the GPU what the tests check on a CPU, and measures the steps of large networks. `--rehearse` does the same
on a CPU with the smallest networks: the tests execute it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import chosen, write
from benchmarks.pool import Pool
from harness.errors import UserError

if TYPE_CHECKING:
    from benchmarks.measure import Table

TABLES = ("contract", "repeats", "precision", "study", "steps", "compiled")


@dataclass(frozen=True)
class Plan:
    """What is checked and measured, and on what."""

    device: str
    contract_families: tuple[str, ...]
    contract_methods: tuple[str, ...]
    """Empty: all."""
    small: tuple[str, ...]
    """Backbones of whole runs."""
    small_methods: tuple[str, ...]
    small_steps: int
    large: tuple[str, ...]
    """Backbones of timed steps."""
    large_methods: tuple[str, ...]
    head: str
    crop: int
    batch: int
    timed_steps: int
    """After a third as many that warm up."""
    processes: int


def gpu_plan() -> Plan:
    return Plan(
        device="cuda:0",
        contract_families=("resnet", "convnext", "swin_transformer", "vision_transformer"),
        contract_methods=(),
        small=("resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"),
        small_methods=("spm", "lora", "full"),
        small_steps=60,
        large=("resnet101", "convnext_base", "swin_base_patch4_window7_224", "vit_base_patch16_224"),
        large_methods=("full", "linear", "spm", "lora"),
        head="fpn",
        crop=512,
        batch=16,
        timed_steps=9,
        processes=min(8, os.cpu_count() or 1),
    )


def rehearsal() -> Plan:
    return Plan(
        device="cpu",
        contract_families=("resnet",),
        contract_methods=("spm",),
        small=("test_resnet",),
        small_methods=("spm",),
        small_steps=6,
        large=("test_resnet",),
        large_methods=("full", "spm"),
        head="fpn:16",
        crop=32,
        batch=2,
        timed_steps=1,
        processes=1,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with the smallest networks")
    parser.add_argument("--only", metavar="A,B", help=f"tables, of {', '.join(TABLES)} (default all)")
    parser.add_argument("--minutes", type=float, default=9, help="what has not begun by then is left out (default 9)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there as well")
    options = parser.parse_args(arguments)
    try:
        _measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace) -> None:
    tables = chosen("--only", options.only, TABLES) or TABLES
    import torch

    from benchmarks import machine

    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("no CUDA device is available; --rehearse executes the same on a CPU")
    plan = rehearsal() if options.rehearse else gpu_plan()
    deadline = time.monotonic() + 60 * options.minutes
    written = [machine.line(torch.device(plan.device))]
    print(written[0], flush=True)
    if options.markdown:  # fails now, not after minutes of measurements
        write(options.markdown, written[0] + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/inductor"
        with Pool(plan.processes, deadline) as pool:
            for name in tables:
                started = time.monotonic()
                table = _table(name, plan, pool, Path(scratch))
                table.notes.append(f"{time.monotonic() - started:.0f} s.")
                written.append(str(table))
                print(f"\n{table}", flush=True)
                if options.markdown:
                    write(options.markdown, "\n\n".join(written) + "\n")


def _table(name: str, plan: Plan, pool: Pool, scratch: Path) -> Table:
    from benchmarks import gpu_checks, gpu_steps

    match name:
        case "contract":
            return gpu_checks.contract(plan, pool)
        case "repeats":
            return gpu_checks.repeats(plan, pool, scratch)
        case "precision":
            return gpu_checks.precision(plan, pool, scratch)
        case "study":
            return gpu_checks.study(plan, scratch)
        case "steps":
            return gpu_steps.steps(plan, pool, scratch)
        case _:
            return gpu_steps.compiled(plan, pool, scratch)


if __name__ == "__main__":
    sys.exit(main())
