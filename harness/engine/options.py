"""How runs are executed: where, by how many processes, for how long. None of it changes a bit of a result.

Each option is one field with its help text. The command line makes its flags from the fields
(`harness/cli/options.py`), and the object goes unchanged from there to the process that executes a run. Does not import
torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.util.option import option, read_size
from harness.util.progress import warn
from harness.util.text import safe_url

if TYPE_CHECKING:
    from harness.runs.store import RunStore


def check_device_name(device: str) -> None:
    """Check the form of a device's name, not whether there is such a device. Raises `UserError`."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", device):
        raise UserError("use auto, cpu, cuda or cuda:N", field="device", value=device)


_STORES = ("http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


def check_tracking(uri: str) -> None:
    """Check that MLflow has such a kind of store, not whether the store answers. Raises `UserError`."""
    kind, colon, _ = uri.partition(":")
    if not colon or kind.partition("+")[0] in _STORES:
        return
    if kind not in {point.name for point in entry_points(group="mlflow.tracking_store")}:
        hint = "use off, http://HOST:PORT, sqlite:///FILE or another database's URL"
        raise UserError("MLflow has no such kind of store", field="tracking", value=safe_url(uri), hint=hint)


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """The options of `run`, `compare` and `search`; `run` leaves out those of several cells.

    Plain values: they are sent to other machines.
    """

    runs: Path = option(Path("runs"), "folder of the run folders", env="HARNESS_RUNS", metavar="FOLDER")
    data: Path = option(Path("data"), "folder of the datasets", env="HARNESS_DATA", metavar="FOLDER")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    workers: int | None = option(
        None, "data-loading processes per run; default: by the number of cores", minimum=0, maximum=256
    )
    tracking: str | None = option(None, "MLflow store, or off; default: SQLite under --runs", env="MLFLOW_TRACKING_URI")
    cache_size: int = option(
        8_000_000_000,
        "disk space under --runs for outputs of frozen stages, such as 500MB or 20GiB; 0: no cache",
        env="HARNESS_CACHE_SIZE",
        metavar="SIZE",
        read=read_size,
        shown_default="8GB",
    )
    checkpoint_seconds: float = option(30.0, "least seconds between two checkpoints", minimum=0, hidden=True)
    plugins: tuple[Path, ...] = option(
        (), "a .py file that defines a method; repeatable", flags=("--plugin",), metavar="FILE"
    )
    threads: int | None = option(None, "threads of torch on the CPU; None: torch's own choice", on_command_line=False)
    cores: tuple[int, ...] = option((), "cores that the process may use; none: all", on_command_line=False)
    time_limit: float | None = option(
        None,
        "minutes that one cell may take, over all its attempts; then it ends as timed out",
        above=0,
    )
    together: int = option(
        1, "cells, or trials of a search, that one process trains side by side on the same images", minimum=1
    )

    @property
    def time_limit_seconds(self) -> float | None:
        return None if self.time_limit is None else 60 * self.time_limit

    def open_store(self, warn: Callable[[str], None] = warn) -> RunStore:
        """The runs under `runs`; MLflow mirrors each state that is written. `warn` gets a line if that fails."""
        from harness.tracking.mirror import tracked_store  # imported here: `--help` must not load pydantic

        return tracked_store(self.runs, self.tracking, warn)
