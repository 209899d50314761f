"""The process that others are forked from: it imports once what they need, and signals to the whole group spare it."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

SENT_TO_ALL = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
"""Signals that a terminal or a batch system sends to every process of a group. They are blocked in the server, which
must outlive its jobs and print no traceback, and at first in what it forks."""


def fork_context(preload: str) -> ForkServerContext:
    """The context of processes that are forked from the server, which imports the module `preload` when it starts.

    The server of this process is started if there is none yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    resource_tracker.ensure_running()  # unblocks the signals that were blocked for the child
    with _signals_blocked():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started inside inherit the blocked signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SENT_TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
