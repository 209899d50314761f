"""The progress of a run: a progress bar on a terminal, plain lines elsewhere, and the same lines in its log.

Everything here goes to stderr; stdout belongs to results.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

LOGGED_LINES = 20
"""The most lines of a phase without a curve, such as the evaluation, in a run's log."""
PLAIN_SECONDS = 10
"""The least seconds between two plain lines of progress."""


def say(text: str) -> None:
    """Print a line for the user."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a line about a problem that stops nothing."""
    say(f"warning: {text}")


class Reporter:
    """Progress of one run. Lines are also logged once there is a run folder (`log_to`)."""

    def __init__(self, quiet: bool = False, silent: bool = False):
        """`quiet`: no progress bar; `silent`: no output (for all but one of the processes that share a batch)."""
        self._bar: Progress | None = None
        self._fancy = not quiet and not silent and sys.stderr.isatty()
        self._silent = silent
        self._log: Path | None = None
        self._last_line = 0.0
        self._task: Any = None
        self._miou: float | None = None

    def log_to(self, path: Path) -> None:
        self._log = path

    def line(self, text: str) -> None:
        """Print a line to stderr and to the log."""
        self.log(text)
        if self._silent:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            say(text)

    def log(self, text: str) -> None:
        """Write a line to the log only."""
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as handle:
                handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Start a phase of `total` steps."""
        self.stop()
        self._began, self._first, self._total, self._what = time.monotonic(), done, total, what
        if not self._fancy:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, completed=done, status="")

    def step(self, step: int, loss: float, lr: float, images_per_second: float) -> None:
        """Show a finished training step, with the mIoU of the last `point`."""
        if self._bar is not None:
            status = f"loss {loss:.3f}  lr {lr:.1e}  train mIoU {_format(self._miou)}  {images_per_second:.1f} img/s"
            self._bar.update(self._task, completed=step, status=status)

    def point(self, step: int, loss: float, lr: float, miou: float | None, images_per_second: float) -> None:
        """Show a point of the training curve."""
        self._miou = miou
        left = (time.monotonic() - self._began) / max(step - self._first, 1) * (self._total - step)
        text = (
            f"step {step}/{self._total}  loss {loss:.3f}  lr {lr:.1e}  train mIoU {_format(miou)}  "
            f"{images_per_second:.1f} img/s  {left:.0f} s left"
        )
        self._plain(text, step)

    def advance(self, done: int) -> None:
        """Show that `done` of the phase's steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        if done in (1, self._total) or done % math.ceil(self._total / LOGGED_LINES) == 0:
            self._plain(f"{self._what} {done}/{self._total}", done)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _plain(self, text: str, done: int) -> None:
        self.log(text)
        now = time.monotonic()
        due = now - self._last_line >= PLAIN_SECONDS or done == self._total
        if self._bar is None and not self._silent and due:
            self._last_line = now
            say(text)


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
