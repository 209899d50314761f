"""What a method costs beyond its parameters: arithmetic of training, and inference against the bare backbone."""

from __future__ import annotations

import copy
import statistics
import sys
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.network import Segmenter
from harness.spec import Budget


def train_flops(network: Segmenter, budget: Budget) -> int:
    """Floating-point operations of the whole budget's forward and backward passes, as torch counts them.

    Counted once, on tensors without data, for one forward pass's share of images; a multiply-add is two.
    """
    shape_only = copy.deepcopy(network).to("meta").train()
    images = budget.batch_size // budget.accumulate
    with FlopCounterMode(display=False) as counter:
        loss, _ = shape_only(
            torch.empty(images, 3, *budget.crop, device="meta"),
            torch.zeros(images, *budget.crop, dtype=torch.uint8, device="meta"),
        )
        loss.backward()
    return counter.get_total_flops() * budget.accumulate * budget.steps


@torch.inference_mode()
def inference_seconds(
    adapted: nn.Module, bare: nn.Module, size: tuple[int, int], device: torch.device, repeats: int = 10
) -> tuple[float, float]:
    """Median seconds of one image [3, *size] through the adapted and through the bare backbone, timed in turn."""
    image = torch.zeros(1, 3, *size, device=device)
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for repeat in range(repeats + 2):
        for which, backbone in enumerate((adapted, bare)):
            began = _clock(device)
            backbone(image)
            if repeat >= 2:
                seconds[which].append(_clock(device) - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: allocated on the GPU, or resident in the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
