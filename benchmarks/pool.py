"""Processes that check and measure, several at a time; one at a time where time is measured."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from harness.util.cores import threads_each
from harness.util.fork_server import SENT_TO_ALL, fork_context


class Pool:
    """Processes that check at the same time; a measurement of time has the device alone under `alone`."""

    def __init__(self, processes: int, deadline: float):
        """`deadline`: by `time.monotonic`."""
        self._deadline = deadline
        context = fork_context("harness.launch.preload")  # a process each that starts by itself imports for seconds
        self._executor = ProcessPoolExecutor(processes, context, _initialise, (context.Lock(), threads_each(processes)))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def map(self, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Each job with its result, in order; with the exception where it failed or was not finished in time."""
        futures = [self._executor.submit(work, *job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            try:
                yield job, future.result(timeout=max(1.0, self._deadline - time.monotonic()))
            except TimeoutError:
                future.cancel()
                yield job, RuntimeError("not measured in the available time; see --minutes")
            except Exception as error:
                yield job, error


def _initialise(lock: Any, threads: int) -> None:
    global alone
    alone = lock
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT_TO_ALL)
    import torch

    torch.set_num_threads(threads)


alone: Any = None
"""The lock that a timing holds; set in the processes of a `Pool`."""


def reason(error: BaseException) -> str:
    """The exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
