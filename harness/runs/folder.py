"""The run folder: spec, state, curve and result of one run. Every file in it is complete or absent.

MLflow, tables and reports are derived from it. `store.py` finds and locks runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.errors import UserError, invalid
from harness.runs.checkpoints import Checkpoints
from harness.runs.locks import RunLock
from harness.runs.result import RunResult
from harness.runs.state import Outcome, RunState
from harness.spec import PROTOCOL, Spec
from harness.util.files import digest, is_unchanged, sha256, write_json, write_text

Listener = Callable[[Path, bool], object]
"""Called with a run folder's path after its state was written, and whether that state ends this attempt."""


@dataclass(frozen=True)
class Status:
    """`status.json`: the last written state. `RunStore.outcome` checks whether it is still valid."""

    state: RunState
    reason: str | None = None
    step: int = 0
    steps: int = 0
    attempt: int = 1
    updated: str = ""
    pid: int = 0
    host: str = ""


_STATUS = TypeAdapter(Status)


class RunFolder:
    """One run's folder, named by its spec's fingerprint."""

    def __init__(self, path: Path, listener: Listener | None = None):
        self.path = path
        self.lock: RunLock | None = None
        """The lock of the executing process; once it is lost, nothing more is written here."""
        self._listener = listener
        self.spec_path = path / "spec.yaml"
        self.status_path = path / "status.json"
        self.result_path = path / "result.json"
        self.delta_path = path / "delta.safetensors"
        self.confusions_path = path / "confusions.npz"
        self.curve_path = path / "curve.jsonl"
        self.log_path = path / "log.txt"
        self.samples_path = path / "samples"
        self.checkpoints = Checkpoints(path / "checkpoint", self.check_lock, path.name)

    @property
    def fingerprint(self) -> str:
        return self.path.name

    def check_lock(self) -> None:
        """Raises `LockLost`."""
        if self.lock is not None:
            self.lock.check()

    # ---- state -------------------------------------------------------------------------------------------------------

    def begin(self, spec: Spec, attempt: int) -> None:
        """Create or reopen the folder; from now on every list shows the run.

        Unfinished files of a killed attempt are removed.
        """
        for unfinished in self.path.rglob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        if not self.spec_path.exists():
            try:
                write_text(self.spec_path, spec.to_yaml())
            except OSError:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
                raise
        self._write_status(RunState.RUNNING, steps=spec.budget.steps, attempt=attempt)

    def progress(self, step: int) -> None:
        """Record a checkpoint after `step` steps."""
        self._write_status(RunState.RUNNING, step=step)
        self._notify(final=False)

    def finish(self, outcome: Outcome, result: RunResult | None = None) -> None:
        """Write the outcome of this attempt; nothing else writes it. `result` is required for `DONE`, and only then.

        Does nothing if there is no folder: such a run was never started.
        """
        if (result is not None) != (outcome.state is RunState.DONE):
            raise ValueError("a result belongs to the state done, and only to it")
        if not self.path.exists():
            return
        self.check_lock()
        if result is not None:
            record = result.model_dump(mode="json", exclude={"digest"})
            record["files"] = {path.name: sha256(path) for path in self._results() if path.exists()}
            write_json(self.result_path, record | {"digest": digest(record)})
        fields = {} if outcome.step is None else {"step": outcome.step}
        self._write_status(outcome.state, reason=outcome.reason, **fields)
        self._notify(final=True)

    def status(self) -> Status | None:
        """None if the run was never started or the file is damaged."""
        try:
            return _STATUS.validate_json(self.status_path.read_bytes())
        except (OSError, ValueError):
            return None

    def _write_status(self, state: RunState, **fields: Any) -> None:
        """Other fields keep their last value, except `reason`, which is removed."""
        self.check_lock()
        last = asdict(self.status() or Status(state))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        fields = {"reason": None, "pid": os.getpid(), "host": socket.gethostname(), "updated": now} | fields
        write_json(self.status_path, {**last, **fields, "state": state.value})

    def _notify(self, final: bool) -> None:
        if self._listener is not None:
            self._listener(self.path, final)

    # ---- contents ----------------------------------------------------------------------------------------------------

    def read_result(self) -> RunResult:
        """Raises `UserError` that names the file, without its folder, if it is missing, invalid, or was changed."""
        try:
            content = self.result_path.read_bytes()
            result = RunResult.model_validate_json(content)
        except OSError as error:
            raise UserError(f"{self.result_path.name}: {error.strerror}") from error
        except ValidationError as error:
            is_json = error.errors()[0]["type"] != "json_invalid"
            raise (invalid(error) if is_json else UserError("not JSON")).at(self.result_path.name) from error
        if result.fingerprint != self.fingerprint:
            raise UserError(f"{self.result_path.name}: belongs to run {result.fingerprint}")
        if result.digest is not None:
            record = json.loads(content)
            del record["digest"]
            if digest(record) != result.digest:
                raise UserError(f"{self.result_path.name}: was changed after the run ended")
        if result.spec.protocol == PROTOCOL and result.spec.fingerprint != result.fingerprint:
            raise UserError(
                f"{self.result_path.name}: its spec was changed: it is that of run {result.spec.fingerprint}"
            )
        return result

    def changed(self, result: RunResult) -> str | None:
        """The name of a file that was changed after the run ended; None if none was, or if that is not known."""
        return next((path.name for path in self._results() if not is_unchanged(path, result.files)), None)

    def _results(self) -> tuple[Path, Path]:
        """The files that a result rests on, besides its own."""
        return self.confusions_path, self.delta_path

    def spec(self) -> Spec:
        """Raises `UserError` if the folder does not hold a complete spec."""
        try:
            spec = Spec.from_yaml(self.spec_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a run folder: its spec.yaml is missing or damaged") from error
        if spec.protocol == PROTOCOL and spec.fingerprint != self.fingerprint:
            raise UserError(f"{self.path}: its spec.yaml was changed: it is that of run {spec.fingerprint}")
        return spec

    def append_curve(self, point: dict[str, Any]) -> None:
        with self.curve_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(point) + "\n")

    def curve(self) -> list[dict[str, Any]]:
        """The training curve so far: each point with its `step`; without half-written and damaged lines."""
        points = []
        with contextlib.suppress(OSError):
            for line in self.curve_path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    point = json.loads(line)
                    if isinstance(point, dict) and type(point.get("step")) is int:
                        points.append(point)
        return points

    def cut_curve(self, step: int) -> None:
        """Remove points after `step`, which will be recomputed."""
        points = [point for point in self.curve() if point["step"] <= step]
        write_text(self.curve_path, "".join(json.dumps(point) + "\n" for point in points))
