"""The run folder: where a run lives, who executes it, how far it is, what came out.

The folder is the truth; everything else (MLflow, tables) is derived from it. What is written to it is whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from harness import claims
from harness.claims import Claim
from harness.errors import UserError
from harness.files import atomically, sha256, write_json, write_text
from harness.spec import Spec

State = Literal["running", "interrupted", "done", "failed", "diverged", "out_of_memory", "unsupported"]
FINGERPRINT_LENGTH = 16


@dataclass(frozen=True)
class Status:
    """How far a run is. Only `done` has a result; every other state has at most a reason and a step."""

    state: State
    reason: str | None = None
    step: int = 0
    steps: int = 0
    attempt: int = 1
    updated: str = ""
    pid: int = 0
    host: str = ""


class RunFolder:
    """One run's folder, named by its spec's fingerprint."""

    def __init__(self, path: Path):
        self.path = path
        self.claim: Claim | None = None
        """Of the process that executes the run; once it is lost, nothing is written here any more."""
        self.result_path = path / "result.json"
        self.delta_path = path / "delta.safetensors"
        self.confusions_path = path / "confusions.npz"
        self.curve_path = path / "curve.jsonl"
        self.log_path = path / "log.txt"
        self.samples_path = path / "samples"
        self.checkpoints = Checkpoints(path / "checkpoint", self.check_claim)

    @property
    def fingerprint(self) -> str:
        return self.path.name

    def check_claim(self) -> None:
        """Raises `ClaimLost`."""
        if self.claim is not None:
            self.claim.check()

    def begin(self, spec: Spec, attempt: int) -> Status:
        """Create the folder, or go on in it; from here on the run is a visible row.

        What a killed attempt was writing when it was killed goes.
        """
        for unfinished in self.path.rglob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        if not (self.path / "spec.yaml").exists():
            try:
                write_text(self.path / "spec.yaml", spec.to_yaml())
            except OSError:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
                raise
        return self.set_status("running", steps=spec.budget.steps, attempt=attempt)

    def set_status(self, state: State, **fields: Any) -> Status:
        """Write the status; fields that are not given keep their last value, except `reason`, which goes."""
        self.check_claim()
        kept = asdict(self.status() or Status(state))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        fields = {"reason": None, "pid": os.getpid(), "host": socket.gethostname(), "updated": now} | fields
        status = Status(**{**kept, **fields, "state": state})
        write_json(self.path / "status.json", asdict(status))
        return status

    def status(self) -> Status | None:
        """None where nothing was ever begun here, or the file is not one of ours."""
        try:
            return Status(**json.loads((self.path / "status.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write_result(self, result: dict[str, Any]) -> None:
        """The last file of a run: from here on it is done."""
        self.check_claim()
        write_json(self.result_path, result)

    def result(self) -> dict[str, Any] | None:
        """What came out, or None where the run is not done or its file is damaged."""
        try:
            result = json.loads(self.result_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return result if isinstance(result, dict) and result.get("status") == "done" else None

    def spec(self) -> Spec:
        """Raises `UserError` where the folder holds no complete spec."""
        try:
            return Spec.from_yaml((self.path / "spec.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a run folder: its spec.yaml is missing or damaged") from error

    def append_curve(self, point: dict[str, Any]) -> None:
        with self.curve_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(point) + "\n")

    def curve(self) -> list[dict[str, Any]]:
        """The training curve so far; a half-written last line is left out."""
        points = []
        with contextlib.suppress(OSError):
            for line in self.curve_path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    points.append(json.loads(line))
        return points

    def cut_curve(self, step: int) -> None:
        """Forget points after `step`, which are about to be computed again."""
        kept = [point for point in self.curve() if point["step"] <= step]
        write_text(self.curve_path, "".join(json.dumps(point) + "\n" for point in kept))


class Checkpoints:
    """States to go on from: one file, named by its step and its own digest, so that a damaged one is known as such."""

    def __init__(self, folder: Path, before_writing: Callable[[], None] = lambda: None):
        self.folder = folder
        self._before_writing = before_writing

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps; the one before is removed only when this one is whole."""
        import torch

        self._before_writing()
        older = self._files()
        staged = self.folder / "staged.pt"
        with atomically(staged) as temporary:
            torch.save(state, temporary)
        target = self.folder / f"{step:09d}-{sha256(staged)[:16]}.pt"
        staged.rename(target)
        for path in older:
            if path != target:
                path.unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The last whole state and its step. Damaged files are moved aside as `*.damaged`."""
        import torch

        for path in reversed(self._files()):
            step, _, digest = path.stem.partition("-")
            if sha256(path).startswith(digest):
                return int(step), torch.load(path, map_location="cpu", weights_only=True)
            path.rename(path.with_suffix(".damaged"))
        return None

    def damaged(self) -> list[Path]:
        """What `latest` moved aside."""
        return sorted(self.folder.glob("*.damaged"))

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("?????????-????????????????.pt"))


class RunStore:
    """All runs under one folder (`--runs`)."""

    def __init__(self, root: Path):
        self.root = root
        self.cache = root / ".cache"

    def folder(self, spec: Spec) -> RunFolder:
        return RunFolder(self.root / spec.fingerprint)

    def __iter__(self) -> Iterator[RunFolder]:
        """Every run folder, finished or not, by fingerprint."""
        if self.root.is_dir():
            for path in sorted(self.root.iterdir()):
                if _is_fingerprint(path.name) and path.is_dir():
                    yield RunFolder(path)

    def find(self, name: str) -> RunFolder:
        """By path, or by the beginning of a fingerprint. Raises `UserError` where that is none or several."""
        if (Path(name) / "spec.yaml").is_file():
            return RunFolder(Path(name))
        found = [run for run in self if run.fingerprint.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"run {name}: {len(found)} runs in {self.root} begin so; give more digits")
        raise UserError(f"run {name}: no such run in {self.root}; `harness list runs` prints them")

    def claim(self, run: RunFolder) -> AbstractContextManager[Claim]:
        """Be the only process that executes this run. The claim of a process that died is free.

        Raises `Claimed` where another process holds it; see `claims.py`.
        """
        return claims.claim(self.root / ".locks", run.fingerprint)

    def status(self, run: RunFolder) -> Status | None:
        """How far a run is, as `RunFolder.status`, but that one whose process ended without a word is interrupted."""
        status = run.status()
        if status is not None and status.state == "running" and self.holder(run) is None:
            return replace(status, state="interrupted", reason=f"its process ended after step {status.step}")
        return status

    def holder(self, run: RunFolder) -> str | None:
        """Which process executes this run now; None where none does."""
        return claims.holder(self.root / ".locks", run.fingerprint)

    def set_aside(self, run: RunFolder) -> Path | None:
        """Keep what a finished or damaged run left, under `.superseded`, so that it can be executed afresh."""
        if not run.path.exists():
            return None
        target = self.root / ".superseded" / f"{run.fingerprint}-{self.attempt(run)}"
        target.parent.mkdir(parents=True, exist_ok=True)
        run.path.rename(target)
        return target

    def attempt(self, run: RunFolder) -> int:
        """Counts the times that this run was begun afresh, from 1; going on after an interruption does not count."""
        return 1 + sum(1 for _ in (self.root / ".superseded").glob(f"{run.fingerprint}-*"))


def _is_fingerprint(name: str) -> bool:
    return len(name) == FINGERPRINT_LENGTH and all(digit in "0123456789abcdef" for digit in name)
