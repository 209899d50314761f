"""The processor cores of this process, and the share of each of several jobs."""

from __future__ import annotations

import os

from harness.util.option import environment_number


def cores() -> list[int]:
    """Indices of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def threads_each(jobs: int) -> int:
    """Threads for each of several jobs at once: an equal share of the cores, and no more than `OMP_NUM_THREADS`."""
    each = max(1, len(cores()) // jobs)
    return min(each, environment_number("OMP_NUM_THREADS", each) or each)
