"""A clock that waits for a device."""

from __future__ import annotations

import time

import torch


def clock(device: torch.device) -> float:
    """Seconds after all pending work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
