"""How several processes share one search: a lock, a check which of them are alive, and retries of failed requests."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.runs import locks
from harness.runs.locks import AlreadyLocked, RunLock

_RETRY_SECONDS = 1.0
"""Seconds between two attempts at a request that is not answered."""


@contextlib.contextmanager
def exclusive(folder: Path, name: str, seconds: float) -> Iterator[RunLock]:
    """Acquire a lock. Raises `AlreadyLocked` if that takes longer than `seconds`."""
    with contextlib.ExitStack() as stack:
        end = time.monotonic() + seconds
        while True:
            try:
                lock = stack.enter_context(locks.lock(folder, name))
                break
            except AlreadyLocked:
                if time.monotonic() > end:
                    raise
                time.sleep(random.uniform(0.01, 0.05))
        yield lock


class LockWatch:
    """Whether the owners of locks are alive."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._beats: dict[str, tuple[bytes, float]] = {}
        """Lock -> the last heartbeat that differed from the one before, and when it was seen."""

    def is_free(self, name: str) -> bool:
        """True immediately if the owner ended on this machine, otherwise after a lease without a heartbeat."""
        if locks.lock_owner(self._folder, name) is None:
            return True
        beat = locks.last_renewal(self._folder, name)
        now = time.monotonic()
        last, since = self._beats.setdefault(name, (beat, now))
        if beat != last:
            self._beats[name] = beat, now
            return False
        return now - since > locks.lease_seconds()

    def forget(self, name: str) -> None:
        """Restart the time of the owner's lease."""
        self._beats.pop(name, None)


@dataclass
class Outage:
    """Retries of a request that is not answered, with one warning, until the patience is used up."""

    remedy: str
    patience: float
    """Seconds."""
    warn: Callable[[str], None]
    warn_after: float = 0.0
    """Seconds without an answer."""
    _since: float | None = None
    _retry_at: float = 0.0
    _warned: bool = False

    @property
    def pausing(self) -> bool:
        """Whether it is too early for a retry."""
        return self._since is not None and time.monotonic() < self._retry_at

    def end(self) -> None:
        self._since, self._warned = None, False

    def go_on(self, problem: str) -> None:
        """Note another failure. Raises `UserError` after `patience`."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        self._retry_at = now + _RETRY_SECONDS
        if now - self._since > self.patience:
            raise UserError(
                f"{problem}, for {self.patience:g} s; {self.remedy} and run the command again, which resumes the search"
            )
        if not self._warned and now - self._since >= self.warn_after:
            self._warned = True
            self.warn(f"{problem}; running trials continue, and it is retried for {self.patience:g} s")
