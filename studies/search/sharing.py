"""How several processes share one search: taking turns, seeing which of them live, and waiting for what is away."""

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
"""Between two attempts at something that does not answer."""


@contextlib.contextmanager
def exclusive(folder: Path, name: str, seconds: float) -> Iterator[RunLock]:
    """Hold a lock, after waiting for it. Raises `AlreadyLocked` where that takes longer than `seconds`."""
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
        """True at once where the owner ended on this machine, elsewhere after a lease without a heartbeat."""
        if locks.lock_owner(self._folder, name) is None:
            return True
        try:
            beat = (self._folder / f"{name}.lease").read_bytes()
        except FileNotFoundError:
            beat = b""
        now = time.monotonic()
        last, since = self._beats.setdefault(name, (beat, now))
        if beat != last:
            self._beats[name] = beat, now
            return False
        return now - since > locks.LEASE

    def forget(self, name: str) -> None:
        """Give the owner the time of a whole lease again."""
        self._beats.pop(name, None)


@dataclass
class Outage:
    """Something that does not answer: it is tried again, with one warning, until the patience is used up."""

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
        """Whether it is too early to try again."""
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
                f"{problem}, for {self.patience:g} s; {self.remedy} and repeat the command, which resumes the search"
            )
        if not self._warned and now - self._since >= self.warn_after:
            self._warned = True
            self.warn(f"{problem}; running trials continue, and it is retried for {self.patience:g} s")
