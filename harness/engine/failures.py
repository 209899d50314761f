"""Maps exceptions to the outcome of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from harness.errors import UserError
from harness.models.network import UnsupportedMethod
from harness.runs.locks import AlreadyLocked, LockLost
from harness.runs.state import Outcome, RunEnded, RunState
from harness.util.files import is_disk_full
from harness.util.text import describe


def outcome_of(error: BaseException) -> Outcome:
    """The outcome of a run that raised `error`; `running` if another process executes it or has taken it over."""
    match error:
        case RunEnded():
            return error.outcome
        case AlreadyLocked():
            return Outcome(RunState.RUNNING, error.lock_owner)
        case LockLost():
            return Outcome(RunState.RUNNING, str(error))
        case KeyboardInterrupt():
            return Outcome(RunState.INTERRUPTED, "stopped")
        case UserError():
            return Outcome(RunState.FAILED, str(error))
    return Outcome(RunState.FAILED, describe(error))


def explained(error: BaseException, folder: Path, step: int) -> BaseException:
    """The error to raise instead if the cause is known, `UserError` or `RunEnded`; else the error itself.

    `step`: optimiser steps done before the error.
    """
    if isinstance(error, UnsupportedMethod):
        return RunEnded(Outcome(RunState.UNSUPPORTED, str(error)))
    if is_disk_full(error):
        return UserError(f"{folder}: {error.strerror}; free some space and run the command again to resume")
    if is_out_of_memory(error):
        reason = (
            f"out of memory after step {step}; use a budget with a larger `accumulate` or smaller crops, a lighter "
            "head, or a device with more memory"
        )
        return RunEnded(Outcome(RunState.OUT_OF_MEMORY, reason))
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises its own class on a GPU, and a RuntimeError from the CPU's allocator or a data-loading worker."""
    texts = ("can't allocate memory", "Caught MemoryError in DataLoader worker")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


def is_bug(error: BaseException) -> bool:
    """Whether the cause is unknown, so that the traceback must be shown."""
    return not isinstance(error, (RunEnded, UserError, KeyboardInterrupt))
