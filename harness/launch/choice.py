"""The launcher that the user chose. The fields are flags; a launcher is imported when it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.util.option import option

if TYPE_CHECKING:
    from harness.launch.launcher import Launcher


@dataclass(frozen=True)
class LauncherChoice:
    """Name, number of jobs at once, and the launcher's own options."""

    name: Literal["local", "ray", "slurm"] = option("local", "where cells are executed", flags=("--launcher",))
    jobs: int | None = option(
        None, "cells at once; default: one per GPU, or one with all cores", flags=("--jobs", "-j"), minimum=1
    )
    device: str = "auto"
    settings: Mapping[str, str] = option(
        {}, "an option of the launcher; repeatable", flags=("--launcher-set",), metavar="KEY=VALUE"
    )

    def open(self) -> Launcher:
        """Raises `UserError` for an option that does not fit, an absent package or a cluster that does not answer."""
        launcher: type[Launcher]
        if self.name == "local":
            from harness.launch.local import LocalLauncher as launcher
        elif self.name == "ray":
            from harness.launch.ray import RayLauncher as launcher
        else:
            from harness.launch.slurm import SlurmLauncher as launcher
        return launcher(self.jobs, self.device, launcher.read_options(self.settings))  # type: ignore[call-arg]
