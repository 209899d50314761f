"""How a command ends: its exit code, one line for what a user can mend, and no traceback after Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Never

from harness.cli import STOPPED
from harness.errors import UserError
from harness.util.files import is_disk_full
from harness.util.progress import say

if TYPE_CHECKING:
    from harness.runs.folder import RunFolder
    from harness.runs.store import RunStore


class Stopped(Exception):
    """A command was stopped, and has this to say of it."""


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Exit codes: 2 for a user error (one line), 1 for a failed run, 130 for Ctrl-C and SIGTERM.

    Ctrl-C and SIGTERM end the process without a traceback at any time, even if a library that is being imported turns
    the interrupt into an error of its own.
    """
    interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except UserError as error:
        _exit(2, f"error: {error.for_command_line()}")
    except Stopped as stopped:
        _exit(130, str(stopped))
    except KeyboardInterrupt:
        _exit(130, STOPPED)
    except SystemExit as end:
        if interrupted and end.code == 130:  # so typer ends a command after a `KeyboardInterrupt`
            say(STOPPED)
        raise
    except Exception as error:
        code = _code_of(error)
        if interrupted and code != 130:
            _exit(130, STOPPED)
        if is_disk_full(error):
            _exit(
                2, f"error: {error.filename or 'the disk'}: {error.strerror}; free some space and run the command again"
            )
        if code is None:
            raise
        _exit(code, f"{error}; the same command resumes" if code == 130 else f"error: {error}")
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of a Ctrl-C while the interpreter shuts down


@contextlib.contextmanager
def ending_as_recorded(store: RunStore, folder: RunFolder) -> Iterator[None]:
    """Raise `RunEnded` in place of an interrupt after which the run's folder says that the run can be resumed."""
    try:
        yield
    except KeyboardInterrupt:
        from harness.runs.state import RunEnded, RunState

        outcome = store.outcome(folder)
        if outcome.state is RunState.INTERRUPTED:
            raise RunEnded(outcome) from None
        raise


def _exit(code: int, message: str) -> Never:
    say(message)
    sys.exit(code)


def _code_of(error: Exception) -> int | None:
    """The exit code of a run that ended without a result; None for a bug, whose traceback is needed."""
    if "harness.runs.state" not in sys.modules:
        return None
    from harness.runs.state import RunEnded, RunState

    if not isinstance(error, RunEnded):
        return None
    return 130 if error.outcome.state is RunState.INTERRUPTED else 1
