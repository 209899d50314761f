"""Studies and searches: many runs under one plan. The shipped study files are in `shipped/`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def shipped_studies() -> dict[str, Path]:
    """The study files that ship, by name."""
    folder = Path(str(resources.files("studies") / "shipped"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
