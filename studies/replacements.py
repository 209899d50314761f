"""Values from the command line in place of a study file's. Does not import torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Replacements:
    """Values from the command line in place of a study's. Empty or None: as in the file."""

    methods: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    seeds: int | None = None
    budget: str | None = None
    trials: int | None = None

    def over(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a study file with these in their place."""
        replaced: dict[str, Any] = {
            name: list(values) for name, values in vars(self).items() if isinstance(values, tuple) and values
        }
        for name in {"methods", "backbones"} & set(replaced):
            # A row that the file describes keeps its description.
            described = {_name(row): row for row in fields.get(name) or () if isinstance(row, str | dict)}
            replaced[name] = [described.get(row, row) for row in replaced[name]]
        if "datasets" in replaced:
            replaced["datasets"] = [_absolute(value) for value in replaced["datasets"]]
        if self.seeds is not None:
            replaced["seeds"] = self.seeds
        if self.budget is not None:
            replaced["budget"] = _absolute(self.budget)
        if self.trials is not None:
            tune = fields.get("tune") or {}
            if isinstance(tune, Mapping):  # else the file's own value is refused
                replaced["tune"] = {**tune, "trials": self.trials} if self.trials else None
        flags = frozenset(replaced) - {"seeds"} - ({"tune"} if self.trials else set())
        return {**fields, **replaced, "flags": flags}


def _name(row: str | dict[str, Any]) -> str:
    return row if isinstance(row, str) else str(row.get("label") or row.get("method") or row.get("backbone"))


def _absolute(value: str) -> str:
    """Paths of the command line are relative to the current folder, not to the study file."""
    return (
        str(Path(os.path.expanduser(value)).absolute()) if "/" in value or value.endswith((".yaml", ".yml")) else value
    )
