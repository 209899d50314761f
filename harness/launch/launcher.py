"""The interface of launchers, which decide where jobs are executed, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from harness.errors import UserError, did_you_mean
from harness.launch.job import Job, JobResult


class Launcher(ABC):
    """Executes jobs somewhere, several at a time. Used as a context manager: leaving it stops what still runs.

    `options` are the launcher's own (`--launcher-set KEY=VALUE`); `defaults` names them all with their defaults and
    help. A constructor raises `UserError` for an option that does not fit, an absent package or a cluster that does
    not answer.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, tuple[Any, str]]] = {}
    """option -> (default, one line of help)."""

    @classmethod
    def read_options(cls, settings: Mapping[str, str]) -> dict[str, Any]:
        """The options, their defaults replaced by `settings`, read as the default's type. Raises `UserError`."""
        options = {name: default for name, (default, _) in cls.defaults.items()}
        for name, text in settings.items():
            if name not in options:
                raise UserError(f"--launcher-set {name}={text}: no such option of {cls.name}; "
                                f"{did_you_mean(name, options)}")  # fmt: skip
            kind = type(options[name])
            try:
                options[name] = text if options[name] is None else kind(text)
            except ValueError as error:
                raise UserError(f"--launcher-set {name}={text}: expected {kind.__name__}") from error
        return options

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    @abstractmethod
    def free(self) -> int:
        """Number of further jobs that can be submitted now."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """Number of jobs that it executes at once, as far as it knows."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Start a job; returns immediately."""

    @abstractmethod
    def wait(self, seconds: float) -> list[JobResult]:
        """Results of the jobs that ended since the last call: one `JobResult` per cell, the cells of a job together.

        Waits up to `seconds` for the first one. Never raises for a job.
        """

    @abstractmethod
    def stop(self, fingerprint: str) -> None:
        """Ask the job of this cell to stop; `wait` reports each of its cells as interrupted."""

    @abstractmethod
    def close(self) -> None:
        """Stop all jobs, wait for them and release all resources. Stopped runs can be resumed."""
