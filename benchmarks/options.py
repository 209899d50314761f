"""Options of a step on this device: memory layout, precision, compilation; each against the plain step."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.measure import Ratio, Table, in_turn
from benchmarks.setting import Setting, Stepper
from harness.models.network import UnsupportedMethod

METHODS = ("full", "spm")
STEPS_A_ROUND = 3


@dataclass(frozen=True)
class Option:
    """The plain step is contiguous, in float32, and not compiled."""

    channels_last: bool = False
    bf16: bool = False
    compiled: bool = False


PLAIN = Option()
OPTIONS = {
    "channels-last": Option(channels_last=True),
    "bf16": Option(bf16=True),
    "both": Option(channels_last=True, bf16=True),
    "compile": Option(compiled=True),
}


def table(setting: Setting, backbones: Sequence[str], methods: Sequence[str], names: Sequence[str]) -> Table:
    result = Table(
        "A step with an option over the plain step",
        ["backbone", "method", "plain, ms", *names],
        "Seconds of forward, backward and update over those of the plain step, which is contiguous, in float32 and not "
        "compiled: below 1 the option is faster. *=*: the first step's loss and gradients are the same to the bit. "
        "*Both*: channels-last and bf16.",
    )
    setting = replace(setting, budget=setting.budget.model_copy(update={"channels_last": False}))
    for backbone in backbones:
        for method in methods:
            try:
                plain = _stepper(setting, backbone, method, PLAIN)
            except UnsupportedMethod as reason:
                result.notes.append(str(reason))
                continue
            first = _first_step(plain)
            steppers, marks = {"plain": plain}, {}
            for name in names:
                try:
                    stepper = _stepper(setting, backbone, method, OPTIONS[name])
                    marks[name] = " =" if _equal(_first_step(stepper), first) else ""
                except Exception as error:  # a compiler may fail in any way; the other options are still measured
                    reason = " ".join(str(error).split())[:200]
                    result.notes.append(f"{name} for {method} on {backbone}: {type(error).__name__}: {reason}")
                else:
                    steppers[name] = stepper
            timed = {name: stepper.timed for name, stepper in steppers.items()}
            seconds = in_turn(timed, setting.rounds * STEPS_A_ROUND, warm_up=2)
            ratios = {name: f"{Ratio.of(seconds[name], seconds['plain'])}{mark}" for name, mark in marks.items()}
            milliseconds = 1000 * statistics.median(seconds["plain"])
            result.add(backbone, method, f"{milliseconds:.0f}", *(ratios.get(name, "-") for name in names))
            torch.compiler.reset()
    return result


def _stepper(setting: Setting, backbone: str, method: str, option: Option) -> Stepper:
    stepper = Stepper(setting, setting.cell(backbone, method))
    if option.channels_last:
        stepper.network.to(memory_format=torch.channels_last)
        stepper.batches = [(images.to(memory_format=torch.channels_last), masks) for images, masks in stepper.batches]
    forward = torch.compile(stepper.network) if option.compiled else stepper.network

    def cast(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=option.bf16):
            return forward(images, masks)

    stepper.forward = cast
    return stepper


def _first_step(stepper: Stepper) -> list[Tensor]:
    """The loss and the gradients, with dropout drawn from one seed; nothing is updated."""
    torch.manual_seed(0)
    loss, _ = stepper.forward(*stepper.batches[0])
    loss.backward()
    gradients = [parameter.grad for _, parameter in stepper.network.trained_parameters() if parameter.grad is not None]
    stepper.optimizer.zero_grad(set_to_none=True)
    return [loss.detach(), *gradients]


def _equal(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
