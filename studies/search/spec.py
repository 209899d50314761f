"""The definition of a search and its folder: ranges, objectives, identity, recorded trials.

`search.py` proposes and records trials. Plans of studies and reports use this module, so it imports neither torch nor
Optuna.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.cells.resolve import Cell
from harness.errors import UserError, did_you_mean
from harness.method import Method
from harness.runs.result import MEASURES_BY_NAME, Measure
from harness.spec import PROTOCOL, Budget
from harness.util.files import digest, write_json

Setting = bool | int | float | str
EDGE = 0.05
"""Share of a range at each end that counts as its edge."""

SAMPLERS = ("tpe", "random", "qmc", "cmaes", "gp", "nsgaii", "grid")
FIXED_IN_ADVANCE = ("random", "qmc", "grid")
"""Samplers whose proposals do not depend on the values of other trials."""
PRUNERS = ("median", "hyperband", "successive_halving")


OBJECTIVES: dict[str, Measure] = {
    name: measure for name, measure in MEASURES_BY_NAME.items() if measure.unit not in ("seconds", "ratio")
}
"""The objectives of searches. Timings are excluded: with them a repeated search would differ."""


class Range(BaseModel):
    """The values of one hyperparameter: numbers from `low` to `high`, both included, or one of `choices`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    choices: tuple[Setting, ...] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Range:
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None or self.log:
                raise ValueError("set choices, or low and high")
        elif self.low is None or self.high is None or self.low > self.high:
            raise ValueError("low and high must be an increasing pair")
        elif self.log and self.low <= 0:
            raise ValueError("a log range must be above zero")
        return self

    def edge(self, value: Setting) -> str | None:
        """`lowest` or `highest` where a number is at an edge of the range: a better one may be beyond it."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if self.choices is not None:
            numbers = [choice for choice in self.choices if isinstance(choice, int | float)]
            low, high, slack = min(numbers), max(numbers), 0.0
        else:
            assert self.low is not None and self.high is not None
            low, high, slack = self.low, self.high, EDGE
        if high == low:
            return None
        log = self.log
        position = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return "lowest" if position <= slack else "highest" if position >= 1 - slack else None

    def beyond(self, declared: Range) -> list[Setting]:
        """The numbers of this range that lie outside `declared`: its ends, or those of its choices."""
        if declared.low is None or declared.high is None:
            return []
        own = (self.low, self.high) if self.choices is None else self.choices
        return [value for value in own if isinstance(value, int | float) and not declared.low <= value <= declared.high]

    @property
    def grid(self) -> tuple[Setting, ...] | None:
        """All values; None for a continuous range."""
        if self.choices is None and self.integer:
            assert self.low is not None and self.high is not None
            return tuple(range(int(self.low), int(self.high) + 1))
        return self.choices

    def __str__(self) -> str:
        if self.choices is not None:
            return "|".join(map(str, self.choices))
        return f"{self.low:g}:{self.high:g}" + (":log" if self.log else "")


def declared_space(method: type[Method]) -> dict[str, Range]:
    """The ranges that a method declares for searches, learning rate and weight decay among them."""
    space = {}
    for name, field_ in method.Hyperparameters.model_fields.items():
        extra = field_.json_schema_extra
        declared = extra.get("search") if isinstance(extra, dict) else None
        if isinstance(declared, list):
            space[name] = Range(choices=tuple(declared))
        elif isinstance(declared, tuple):
            low, high, *scale = declared
            space[name] = Range(low=low, high=high, log=scale == ["log"], integer=field_.annotation is int)
    return space


def parse_range(method: type[Method], name: str, text: str, field: str | None = None) -> Range:
    """Parse `LOW:HIGH`, `LOW:HIGH:log` or `A|B|C` for one hyperparameter; `field`: for errors.

    Raises `UserError` for an invalid range.
    """
    field = field or f"space.{name}"
    fields = method.Hyperparameters.model_fields
    if name not in fields:
        hint = did_you_mean(name, fields)
        raise UserError(f"method {method.name} has no such hyperparameter", field=field, value=text, hint=hint)

    def value(part: str) -> Setting:
        try:
            return getattr(method.Hyperparameters.parse(method.name, {name: part}), name)
        except UserError as error:
            raise UserError(error.problem, field=field, value=text) from error

    numbers = re.fullmatch(r"([^:|]+):([^:|]+)(:log)?", text)
    try:
        if numbers is None or fields[name].annotation not in (int, float):
            choices = tuple(value(part) for part in text.split("|"))
            if len(set(choices)) < len(choices):
                raise UserError("a choice is listed twice", field=field, value=text)
            return Range(choices=choices)
        low, high, log = numbers.groups()
        return Range(low=value(low), high=value(high), log=log is not None, integer=fields[name].annotation is int)
    except ValidationError as error:
        problem = "use LOW:HIGH, LOW:HIGH:log or A|B|C, low below high, above 0 for log"
        raise UserError(problem, field=field, value=text) from error


def make_space(
    method: type[Method], names: list[str] | None, given: Mapping[str, str], fixed: Mapping[str, Any]
) -> dict[str, Range]:
    """The ranges to search: the declared ones (only of `names`, if any), replaced by those in `given`, without `fixed`.

    Raises `UserError` for a name without a range, or if nothing is left to search.
    """
    declared = declared_space(method)
    for name in names or ():
        if name not in declared and name not in given:
            problem = f"method {method.name} declares no range for it"
            raise UserError(problem, field="parameters", value=name, hint=did_you_mean(name, declared))
    chosen = {name: range_ for name, range_ in declared.items() if names is None or name in names}
    chosen |= {name: parse_range(method, name, text) for name, text in given.items()}
    space = {name: range_ for name, range_ in sorted(chosen.items()) if name not in fixed}
    if not space:
        raise UserError(f"nothing to search: method {method.name} has no range left; use --space NAME=LOW:HIGH")
    return space


def check_names(sampler: str | None, pruner: str | None) -> None:
    """Raises `UserError` for an unknown sampler or pruner."""
    if sampler is not None:
        _check_name("sampler", sampler, SAMPLERS)
    if pruner:
        _check_name("pruner", pruner, PRUNERS)


def _check_name(field: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UserError(f"no such {field}", field=field, value=name, hint=did_you_mean(name, known))


class SearchSpec(BaseModel):
    """One search, complete and immutable. The number of trials is not part of it: a search can be extended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    method_code: str
    fixed: dict[str, Setting] = Field(description="the hyperparameters that are not searched")
    space: dict[str, Range]
    backbone: str
    weights: str
    dataset: str
    data_digest: str
    head: str
    budget: Budget
    seeds: tuple[int, ...] = Field(min_length=1, description="of a trial's runs, whose mean is its value")
    sampler: str = "tpe"
    pruner: str | None = None
    objectives: tuple[str, ...] = ("miou",)

    @property
    def is_fixed_in_advance(self) -> bool:
        """Whether what is tried, and for how long, does not depend on other trials: they may run at the same time."""
        return self.sampler in FIXED_IN_ADVANCE and self.pruner is None

    @classmethod
    def of(
        cls,
        cell: Cell,
        space: dict[str, Range],
        sampler: str = "tpe",
        pruner: str | None = None,
        objectives: tuple[str, ...] = ("miou",),
        seeds: tuple[int, ...] = (),
    ) -> SearchSpec:
        """The search around a cell on the dev split; `seeds`: of each trial's runs, by default the cell's own.

        Raises `UserError` for an unknown name.
        """
        spec = cell.spec
        check_names(sampler, pruner)
        for objective in objectives:
            _check_name("objective", objective, OBJECTIVES)
        if len(set(objectives)) != len(objectives) or not objectives:
            raise UserError(f"--objective {','.join(objectives)}: use each objective once")
        if pruner and objectives != ("miou",):
            raise UserError(f"--pruner {pruner}: Optuna only prunes searches with one objective; omit the flag")
        if pruner and len(seeds) > 1:
            raise UserError("only trials of one seed can be pruned", field="pruner", value=pruner)
        return cls(
            method=spec.method,
            method_code=spec.method_code,
            fixed={name: value for name, value in spec.hyperparameters.items() if name not in space},
            space=space,
            **spec.model_dump(include={"backbone", "weights", "dataset", "data_digest", "head"}),
            seeds=seeds or (spec.seed,),
            budget=spec.budget,
            sampler=sampler,
            pruner=pruner,
            objectives=objectives,
        )

    @property
    def seed(self) -> int:
        """The sampler's seed."""
        return self.seeds[0]

    @cached_property
    def name(self) -> str:
        """Readable, unique, and valid as a file name."""
        own = self.model_dump(mode="json", exclude={"dataset", "budget"})
        identity = [PROTOCOL, {**own, "budget": self.budget.identity()}]
        words = (self.method, self.backbone, self.dataset, digest(identity)[:8])
        return "-".join(re.sub(r"[^\w.]+", "_", word) for word in words)


class TrialState(enum.StrEnum):
    """Optuna's states of a trial. The value is used in files and tables."""

    RUNNING = "running"
    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"

    @property
    def optuna(self) -> str:
        """The name of Optuna's own state."""
        return "FAIL" if self is TrialState.FAILED else self.name

    @classmethod
    def of(cls, optuna: str) -> TrialState:
        return next(state for state in cls if state.optuna == optuna)


@dataclass(frozen=True)
class Trial:
    """One trial as the search's folder records it."""

    number: int
    state: TrialState
    settings: dict[str, Setting]
    fingerprint: str = ""
    others: tuple[str, ...] = ()
    """The fingerprints of its runs at further seeds."""
    values: list[float] | None = None
    """The value of each objective, the mean over seeds; None unless the trial is complete."""
    steps: int = 0
    """Executed optimiser steps of all its runs."""
    reason: str | None = None


@dataclass(frozen=True)
class SearchFolder:
    """`RUNS/searches/NAME/`: `search.json`, `trials.json`, and at the end recipes, importances and plots."""

    path: Path
    spec: SearchSpec = field(compare=False)

    @classmethod
    def under(cls, runs: Path, spec: SearchSpec) -> SearchFolder:
        return cls(runs / "searches" / spec.name, spec)

    def begin(self) -> None:
        if not (self.path / "search.json").exists():
            write_json(self.path / "search.json", self.spec.model_dump(mode="json"))

    def write(self, trials: list[Trial]) -> None:
        write_json(self.path / "trials.json", [asdict(trial) for trial in trials])

    def trials(self) -> list[Trial]:
        """By number. Empty before the first one, or if the file is damaged: the storage has them as well."""
        try:
            rows = json.loads((self.path / "trials.json").read_text(encoding="utf-8"))
            return [
                Trial(**{**row, "state": TrialState(row["state"]), "others": tuple(row.get("others", ()))})
                for row in rows
            ]
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def count_ended(self, trials: int) -> int:
        """How many of the first `trials` have ended, in any state."""
        return sum(trial.number < trials and trial.state is not TrialState.RUNNING for trial in self.trials())

    def is_finished(self, trials: int) -> bool:
        """Whether this many trials have ended."""
        return self.count_ended(trials) >= trials

    def best(self, trials: int) -> Trial | None:
        """The complete trial with the best first objective among the first `trials`; the earlier of equal ones."""
        sign = 1 if OBJECTIVES[self.spec.objectives[0]].better == "higher" else -1
        complete = [(sign * t.values[0], -t.number, t) for t in self.trials() if t.number < trials and t.values]
        return max(complete, key=lambda row: row[:2])[2] if complete else None
