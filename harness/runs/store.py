"""All runs under one folder: finds them, reads the state of each, and locks them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from harness.errors import UserError
from harness.runs import locks
from harness.runs.folder import Listener, RunFolder
from harness.runs.locks import RunLock
from harness.runs.result import RunResult
from harness.runs.state import Outcome, RunState
from harness.spec import Spec

FINGERPRINT_LENGTH = 16


class RunStore:
    """The run folders under `root` (`--runs`)."""

    def __init__(self, root: Path, listener: Listener | None = None, cache: Path | None = None):
        """`listener` is called after every state that is written to a run folder of this store; see `tracked_store`.

        `cache`: the folder for what is computed once, by default `.cache` under `root`.

        Raises `UserError` for an invalid HARNESS_LEASE, before anything is started.
        """
        locks.lease_seconds()
        self.root = root
        self.cache = cache or root / ".cache"
        self._locks = root / ".locks"
        self._listener = listener

    def folder(self, spec: Spec) -> RunFolder:
        return self.by_fingerprint(spec.fingerprint)

    def by_fingerprint(self, fingerprint: str) -> RunFolder:
        """The folder of a run, which may not exist yet."""
        return RunFolder(self.root / fingerprint, self._listener)

    def __iter__(self) -> Iterator[RunFolder]:
        """Every run folder, finished or not, by fingerprint."""
        if self.root.is_dir():
            for path in sorted(self.root.iterdir()):
                if is_fingerprint(path.name) and path.is_dir():
                    yield RunFolder(path, self._listener)

    def find(self, name: str) -> RunFolder:
        """Find a run by path or by the first digits of its fingerprint. Raises `UserError` unless one matches."""
        if os.path.isfile(Path(name) / "spec.yaml"):
            return RunFolder(Path(name), self._listener)
        found = [run for run in self if run.fingerprint.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"run {name}: {len(found)} runs in {self.root} start with it; use more digits")
        raise UserError(f"run {name}: no such run in {self.root}; `harness list runs` prints them")

    def outcome(self, run: RunFolder) -> Outcome:
        """The state of a run: the one answer to "is it done?" and "which state?"."""
        return self.read(run)[0]

    def read(self, run: RunFolder) -> tuple[Outcome, RunResult | None]:
        """The state of a run, and its result where it is done.

        A valid result means done, whatever `status.json` says. A run whose process was killed is interrupted.
        """
        if not run.result_path.exists():
            return self._outcome_without_result(run), None
        try:
            result = run.read_result()
        except UserError as error:
            return Outcome(RunState.DAMAGED, str(error)), None
        return Outcome(RunState.DONE, None, result.steps), result

    def _outcome_without_result(self, run: RunFolder) -> Outcome:
        status = run.status()
        if status is None:
            if not run.path.exists():
                return Outcome(RunState.TO_DO)
            return Outcome(RunState.DAMAGED, f"{run.status_path.name}: missing or damaged")
        if status.state is RunState.DONE:
            return Outcome(RunState.DAMAGED, f"{run.result_path.name}: missing")
        if status.state is RunState.RUNNING and self.lock_owner(run) is None:
            return Outcome(RunState.INTERRUPTED, f"its process ended after step {status.step}", status.step)
        return Outcome(status.state, status.reason, status.step)

    def lock(self, run: RunFolder) -> AbstractContextManager[RunLock]:
        """Lock the run: only one process executes it. The lock of a dead process is free.

        Raises `AlreadyLocked` if another process holds it; see `locks.py`.
        """
        return locks.lock(self._locks, run.fingerprint)

    def lock_owner(self, run: RunFolder) -> str | None:
        """The process that executes this run now, as text; None if there is none."""
        return locks.lock_owner(self._locks, run.fingerprint)

    def record(self, spec: Spec, outcome: Outcome) -> Outcome:
        """Write the outcome of a run whose process has died, and return the one that holds: a finished run stays done.

        A damaged result stays where it is, for its next execution.

        Raises `AlreadyLocked`, `UserError` or `OSError`.
        """
        run = self.folder(spec)
        with self.lock(run) as run.lock:
            found = self.outcome(run)
            if found.state is RunState.DONE:
                return found
            if run.status() is None:
                run.begin(spec, self.attempt(run))
            run.finish(outcome)
        return outcome

    def archive(self, run: RunFolder) -> Path | None:
        """Archive a run folder in `.superseded`, so that the run can be rerun from the start."""
        if not run.path.exists():
            return None
        target = self.root / ".superseded" / f"{run.fingerprint}-{self.attempt(run)}"
        target.parent.mkdir(parents=True, exist_ok=True)
        run.path.rename(target)
        return target

    def attempt(self, run: RunFolder) -> int:
        """How often this run was started from the beginning, including this time; resuming does not count."""
        return 1 + sum(1 for _ in (self.root / ".superseded").glob(f"{run.fingerprint}-*"))


def is_fingerprint(name: str) -> bool:
    return len(name) == FINGERPRINT_LENGTH and all(digit in "0123456789abcdef" for digit in name)
