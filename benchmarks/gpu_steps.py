"""Time and memory of a step of large networks, eager and compiled, and the memory that the shapes predict."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import pool as processes
from benchmarks.costs import peak_bytes
from benchmarks.gpu import Plan
from benchmarks.gpu_checks import made_dataset
from benchmarks.measure import Clock, Table
from benchmarks.pool import Pool, reason
from benchmarks.setting import Setting, Stepper
from harness.engine.cost import step_cost
from harness.engine.device import make_fabric, make_reproducible
from harness.engine.repeatable import kernel_that_does_not_repeat, strict_mode
from harness.spec import budget_from

GIB = 2**30


def steps(plan: Plan, pool: Pool, scratch: Path) -> Table:
    table = Table(
        f"A step at {plan.crop}x{plan.crop}, batch {plan.batch}, head {plan.head}",
        ["backbone", "method", "fp32, ms", "over full", "bf16, ms", "over full", "fp32 peak, GiB", "over full",
         "predicted", "bf16 peak, GiB"],
        "Forward, backward and update, in channels-last layout, with kernels that repeat: the median. *Peak*: "
        "the most bytes allocated within a step, with weights, gradients and the optimiser's state. *Predicted*: by "
        "the shapes alone, over the peak.",
    )  # fmt: skip
    jobs = [(plan, scratch, backbone, method) for backbone in plan.large for method in plan.large_methods]
    full: dict[str, Any] = {}
    for (_, _, backbone, method), found in pool.map(_step, jobs):
        if isinstance(found, Exception):
            table.notes.append(f"{method} on {backbone}: {reason(found)}")
            continue
        if method == "full":
            full = found
        table.add(
            backbone,
            method,
            f"{1000 * found['fp32']:.1f}",
            f"{found['fp32'] / full['fp32']:.2f}",
            f"{1000 * found['bf16']:.1f}",
            f"{found['bf16'] / full['bf16']:.2f}",
            f"{found['fp32_peak'] / GIB:.2f}",
            f"{found['fp32_peak'] / full['fp32_peak']:.2f}",
            f"{found['predicted'] / found['fp32_peak']:.2f}",
            f"{found['bf16_peak'] / GIB:.2f}",
        )
    return table


def _step(plan: Plan, scratch: Path, backbone: str, method: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        setting = _setting(plan, scratch, precision)
        if precision == "fp32":
            network = setting.network(setting.cell(backbone, method)).cpu()
            found["predicted"] = step_cost(network, setting.budget).peak_bytes
            del network
        stepper = _stepper(setting, backbone, method)
        with processes.alone, _mode(setting, stepper):
            found[f"{precision}_peak"] = peak_bytes(stepper)
            found[precision] = _seconds(stepper, plan.timed_steps)
        _free(stepper)
    return found


def compiled(plan: Plan, pool: Pool, scratch: Path) -> Table:
    table = Table(
        f"torch.compile of a step at {plan.crop}x{plan.crop}, batch {plan.batch}, bf16",
        ["backbone", "method", "eager, ms", "compiled, ms", "ratio", "first step, s", "peak over eager"],
        "The first step compiles; the ratio is that of the steps after it: below 1 compilation is faster.",
    )
    jobs = [(plan, scratch, backbone, method) for method in plan.large_methods for backbone in plan.large]
    for (_, _, backbone, method), found in pool.map(_compiled_step, jobs):
        if isinstance(found, Exception):
            table.notes.append(f"{method} on {backbone}: {reason(found)}")
            continue
        eager, ours = found["eager"], found["compiled"]
        table.add(
            backbone,
            method,
            f"{1000 * eager:.1f}",
            f"{1000 * ours:.1f}",
            f"{ours / eager:.2f}",
            f"{found['first']:.0f}",
            f"{found['compiled_peak'] / found['eager_peak']:.2f}",
        )
    return table


def _compiled_step(plan: Plan, scratch: Path, backbone: str, method: str) -> dict[str, float]:
    setting = _setting(plan, scratch, "bf16")
    stepper = _stepper(setting, backbone, method)
    found: dict[str, float] = {}
    with processes.alone, _mode(setting, stepper):
        found["eager_peak"] = peak_bytes(stepper)
        found["eager"] = _seconds(stepper, plan.timed_steps)
    torch.compiler.reset()
    network = torch.compile(stepper.network)
    stepper.forward = _autocast(setting, network)
    started = time.perf_counter()
    with _mode(setting, stepper):
        stepper.timed()  # beside other processes that compile
    found["first"] = time.perf_counter() - started
    with processes.alone, _mode(setting, stepper):
        found["compiled_peak"] = peak_bytes(stepper)
        found["compiled"] = _seconds(stepper, plan.timed_steps)
    _free(stepper)
    return found


def _setting(plan: Plan, scratch: Path, precision: str) -> Setting:
    fields = {"steps": 10, "batch_size": plan.batch, "crop": [plan.crop, plan.crop], "channels_last": True}
    budget = budget_from(fields | {"precision": precision}, "gpu steps")
    make_reproducible()
    fabric = make_fabric(plan.device, budget.precision)
    return Setting(
        dataset=str(made_dataset(scratch / "made")),
        head=plan.head,
        weights="random",
        budget=budget,
        rounds=1,
        workers=0,
        data=scratch,
        scratch=scratch,
        fabric=fabric,
        clock=Clock(fabric.device),
    )


def _stepper(setting: Setting, backbone: str, method: str) -> Stepper:
    cell = setting.cell(backbone, method)
    budget, device = setting.budget, setting.device
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(budget.batch_size, 3, *budget.crop, generator=draw)
    masks = torch.randint(0, len(cell.dataset.classes), (budget.batch_size, *budget.crop), generator=draw)
    stepper = Stepper(setting, cell, [(setting.images(images), masks.to(torch.uint8).to(device))])
    stepper.forward = _autocast(setting, stepper.network)
    return stepper


def _mode(setting: Setting, stepper: Stepper) -> AbstractContextManager[None]:
    """Strict mode if a run would train the network in it."""
    kernel = kernel_that_does_not_repeat(stepper.network, setting.budget, setting.fabric)
    return strict_mode() if setting.device.type == "cuda" and kernel is None else nullcontext()


def _autocast(setting: Setting, network: Any) -> Any:
    def forward(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.budget.precision == "bf16"):
            loss, logits = network(images, masks)
        return loss, logits

    return forward


def _seconds(stepper: Stepper, steps: int) -> float:
    for _ in range(steps // 3):
        stepper.step()
    return statistics.median(stepper.timed() for _ in range(steps))


def _free(stepper: Stepper) -> None:
    """Free the device's memory: another process measures next."""
    del stepper.network, stepper.optimizer, stepper.batches, stepper.forward
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
