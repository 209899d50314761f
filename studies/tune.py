"""`tune` of a study file: the search of every row, and the one of the head's learning rate that comes first.

Imports neither torch nor Optuna.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from harness.cells.request import Request
from harness.errors import InvalidField
from harness.method import methods
from harness.spec import Integer, Seed
from studies.search.spec import Range, declared_space, make_space

MAX_SEEDS = 10_000
MAX_TRIALS = 100_000

HEAD_METHOD, HEAD_LR = "linear", "head_lr"
"""`tune.head` searches this hyperparameter with this method."""


def seeds_from_count(seeds: Any) -> Any:
    """A number of seeds from 0 -> those seeds; a list as it is, if it is not too long."""
    if isinstance(seeds, list) and len(seeds) > MAX_SEEDS:
        raise ValueError(f"has {len(seeds)} seeds; use 1 to {MAX_SEEDS}")
    if isinstance(seeds, bool | str | float | dict) or seeds is None:
        raise ValueError("expected an integer, or a list of seeds")
    if not isinstance(seeds, int):
        return seeds
    if not 1 <= seeds <= MAX_SEEDS:
        raise ValueError(f"use 1 to {MAX_SEEDS} seeds, or a list")
    return tuple(range(seeds))


def range_from_list(value: Any) -> Any:
    """`[0.001, 0.01]` -> `0.001|0.01`; text, and None, as they are. Raises `ValueError` for anything else."""
    if isinstance(value, list) and value:
        return "|".join(map(str, value))
    if not isinstance(value, str | None):
        raise ValueError("expected LOW:HIGH, LOW:HIGH:log, A|B|C or a list of values")
    return value


def ranges_from_lists(space: Any) -> Any:
    """`range_from_list` of every hyperparameter; anything but a mapping as it is. Raises `InvalidField`."""
    if not isinstance(space, dict):
        return space
    found = {}
    for name, value in space.items():
        try:
            found[name] = range_from_list(value)
        except ValueError as error:
            raise InvalidField(str(name), str(error), value) from error
    return found


class HeadTune(BaseModel):
    """A search of `head_lr` with `linear`, once for each backbone, dataset and head; every row gets its result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: Integer = Field(ge=1, le=MAX_TRIALS, description="for each backbone, dataset and head")
    space: str | None = Field(None, description="LOW:HIGH, LOW:HIGH:log or A|B|C; default: the declared range")

    _from_list = field_validator("space", mode="before")(range_from_list)


class Tune(BaseModel):
    """A search for every row of the table, scored on the dev split; its best hyperparameters are used for all seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    head: HeadTune | None = Field(None, description="the search of the head's learning rate, which comes first")
    trials: Integer = Field(ge=1, le=MAX_TRIALS, description="trials of each row; pruned and failed ones count")
    parameters: tuple[str, ...] | None = Field(None, description="hyperparameters; default: all with a declared range")
    space: dict[str, str] = Field(
        {}, description="hyperparameter -> LOW:HIGH, LOW:HIGH:log or A|B|C, in place of the declared range"
    )
    sampler: str | None = Field(None, description="default: grid where all ranges are lists, else tpe")
    pruner: str | None = Field(None, description="as `--pruner`, with one seed per trial; default: no pruning")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, description="of a trial, whose value is the mean over them")

    _from_count = field_validator("seeds", mode="before")(seeds_from_count)
    _from_lists = field_validator("space", mode="before")(ranges_from_lists)

    @field_validator("head", mode="before")
    @classmethod
    def _check_head(cls, head: Any) -> Any:
        if head is None or isinstance(head, dict | HeadTune):
            return head
        raise ValueError("expected the fields `space` and `trials`, or nothing")

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is listed twice")
        return seeds

    @model_validator(mode="after")
    def _check_pruner(self) -> Tune:
        if self.pruner and len(self.seeds) > 1:
            problem = f"only prunes trials of one seed, and `seeds` has {len(self.seeds)}"
            raise InvalidField("pruner", problem, self.pruner)
        return self

    def head_space(self) -> dict[str, Range]:
        """The range that `head` searches. Raises `UserError`, of the field `space`."""
        assert self.head is not None
        given = {} if self.head.space is None else {HEAD_LR: self.head.space}
        return make_space(methods.get(HEAD_METHOD), [HEAD_LR], given, {})

    def space_of(self, request: Request, own: Mapping[str, str]) -> dict[str, Range]:
        """The ranges that a row searches: `own` are those of the row itself, in place of the study's. Without what its
        settings fix, and `head_lr` if `head` searches it. Empty if nothing is left. Raises `UserError`."""
        method = methods.get(request.method)
        known = method.Hyperparameters.model_fields
        given = {name: text for name, text in self.space.items() if name in known} | dict(own)
        names = None if self.parameters is None else [name for name in self.parameters if name in known]
        fixed = {*request.settings, *([HEAD_LR] if self.head is not None else [])}
        if not {*(declared_space(method) if names is None else names), *given} - fixed:
            return {}
        return make_space(method, names, given, dict.fromkeys(fixed))

    def sampler_of(self, space: dict[str, Range]) -> str:
        """The sampler of a search. By default a list of values is tried value by value: TPE may repeat one of a few and
        leave out another."""
        return self.sampler or ("grid" if _points(space) else "tpe")

    def trials_of(self, space: dict[str, Range], trials: int) -> int:
        """The trials of a search: no more than there are values, where lists are tried value by value by default."""
        points = _points(space)
        return min(trials, points) if points and self.sampler is None else trials


def _points(space: dict[str, Range]) -> int:
    """The number of combinations of values; 0 if a range is not a list."""
    return math.prod(len(range_.choices or ()) for range_ in space.values())
