"""The line above the tables: machine and date of the measurement."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import torch

from harness.util import provenance


def line(device: torch.device) -> str:
    """Processor, accelerator if there is one, torch, the harness's commit, the date, and the load of the machine."""
    code = provenance.code()
    parts = [
        provenance.device_name(torch.device("cpu")),
        f"cores {os.cpu_count()}, threads {torch.get_num_threads()}",
        *([] if device.type == "cpu" else [provenance.device_name(device)]),
        f"torch {torch.__version__}",
        f"commit {(code['commit'] or 'unknown')[:12]}" + (" with changes" if code["dirty"] else ""),
        f"{datetime.now(UTC):%Y-%m-%d}",
        f"load at the start {os.getloadavg()[0]:.1f}",
    ]
    return ", ".join(parts)
