"""A study file: methods × backbones × datasets × heads × seeds under one budget, checked and turned into requests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.cells.resolve import Request
from harness.errors import UserError, did_you_mean
from harness.spec import Budget, budget, budget_from, first_problem, read_yaml
from studies import shipped_studies

Setting = bool | int | float | str


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MethodArm(_Part):
    """One row of the table: a method with what is fixed of its hyperparameters."""

    method: str
    label: str = ""
    settings: dict[str, Setting] = {}

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"method": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _labelled(self) -> MethodArm:
        if self.label:
            return self
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return self.model_copy(update={"label": f"{self.method}({settings})" if settings else self.method})


class BackboneArm(_Part):
    backbone: str
    weights: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"backbone": given} if isinstance(given, str) else given


class Tune(_Part):
    """The same search for every row of the table, on the dev part, before its seeds are run on the reported part."""

    trials: int = Field(ge=1, description="of every method; pruned and failed ones count")
    parameters: tuple[str, ...] | None = Field(None, description="hyperparameters; default all with a declared range")
    space: dict[str, str] = Field(
        {}, description="hyperparameter -> LOW:HIGH, LOW:HIGH:log or A|B|C, over the declared"
    )
    sampler: str = "tpe"
    pruner: str | None = None
    seed: int = Field(0, ge=0, lt=2**31)


class Override(_Part):
    """Hyperparameters of the cells that match every pattern (`*` and `?`). Nothing else can differ between cells."""

    method: str = Field("*", description="pattern on the label or the method's name")
    backbone: str = "*"
    dataset: str = "*"
    head: str = "*"
    settings: dict[str, Setting] = Field(min_length=1)

    def matches(self, arm: MethodArm, request: Request) -> bool:
        pairs = ((self.backbone, request.backbone), (self.dataset, request.dataset), (self.head, request.head))
        named = fnmatchcase(arm.label, self.method) or fnmatchcase(arm.method, self.method)
        return named and all(fnmatchcase(value, pattern) for pattern, value in pairs)


class Study(_Part):
    """The fields of a study file."""

    title: str = ""
    budget: str | dict[str, Any] = Field("demo", description="name, .yaml file, or fields of a budget")
    methods: tuple[MethodArm, ...] = Field(min_length=1)
    backbones: tuple[BackboneArm, ...] = Field(min_length=1)
    datasets: tuple[str, ...] = Field(min_length=1)
    heads: tuple[str, ...] = Field(("fpn",), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="a list, or how many from 0")
    tune: Tune | None = None
    overrides: tuple[Override, ...] = ()
    source: Path = Field(Path("study.yaml"), exclude=True, description="the file; relative paths in it start there")

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, given: Any) -> Any:
        return tuple(range(given)) if isinstance(given, int) and not isinstance(given, bool) else given

    @model_validator(mode="after")
    def _each_once(self) -> Study:
        for field, values in (
            ("methods", [arm.label for arm in self.methods]),
            ("backbones", [(arm.backbone, arm.weights) for arm in self.backbones]),
            ("datasets", self.datasets),
            ("heads", self.heads),
            ("seeds", self.seeds),
        ):
            twice = next((value for value in values if list(values).count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"{field}: {twice} is there twice; give two rows of one method a `label` each")
        return self

    @property
    def name(self) -> str:
        return self.source.stem

    def the_budget(self) -> Budget:
        """Raises `UserError`."""
        if isinstance(self.budget, dict):
            return budget_from(self.budget, self.name, f"{self.source}: budget")
        return budget(self._path(self.budget) if self.budget.endswith((".yaml", ".yml")) else self.budget)

    def requests(self) -> Iterator[tuple[MethodArm, Request]]:
        """Every row of the table with its settings and the study's first seed: what seeds and a search build on."""
        chosen = self.the_budget()
        for backbone, dataset, head, arm in itertools.product(
            self.backbones, self.datasets, self.heads, self.methods
        ):  # fmt: skip
            request = Request(
                method=arm.method,
                backbone=backbone.backbone,
                weights=self._weights(backbone.weights),
                dataset=self._path(dataset) if "/" in dataset or dataset.endswith((".yaml", ".yml")) else dataset,
                head=head,
                budget=chosen,
                seed=self.seeds[0],
                settings=dict(arm.settings),
            )
            for override in self.overrides:
                if override.matches(arm, replace(request, dataset=dataset)):
                    request.settings.update(override.settings)
            yield arm, request

    def _weights(self, given: str) -> str:
        return given if given in ("auto", "random") or given.startswith("package:") else self._path(given)

    def _path(self, given: str) -> str:
        return str(self.source.parent / Path(given).expanduser())


@dataclass(frozen=True)
class Replacements:
    """What the command line puts in place of a study's lists. Empty: as the file says."""

    methods: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    seeds: int | None = None
    budget: str | None = None
    trials: int | None = None

    def over(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {
            name: list(values)
            for name, values in vars(self).items()
            if isinstance(values, tuple) and values
        }  # fmt: skip
        for name in ("methods", "backbones"):
            # A row that the file describes keeps its description.
            known = {_name(row): row for row in fields.get(name) or () if isinstance(row, str | dict)}
            given |= {name: [known.get(row, row) for row in given[name]]} if name in given else {}
        for path in ("datasets",):
            given |= {path: [_from_here(value) for value in given[path]]} if path in given else {}
        if self.seeds is not None:
            given["seeds"] = self.seeds
        if self.budget is not None:
            given["budget"] = _from_here(self.budget)
        if self.trials is not None:
            given["tune"] = {**(fields.get("tune") or {}), "trials": self.trials} if self.trials else None
        return {**fields, **given}


def _name(row: str | dict[str, Any]) -> str:
    return row if isinstance(row, str) else str(row.get("label") or row.get("method") or row.get("backbone"))


def _from_here(value: str) -> str:
    """Paths of the command line start where it was given, not at the study file."""
    return str(Path(value).expanduser().absolute()) if "/" in value or value.endswith((".yaml", ".yml")) else value


def load_study(name: str | Path, replacements: Replacements | None = None) -> Study:
    """A study file, or a shipped one by its name, checked as a whole.

    Raises `UserError` that names the file and the field.
    """
    path = Path(name)
    shipped = shipped_studies()
    if not path.is_file():
        if str(name) not in shipped:
            missing = path.suffix in (".yaml", ".yml")
            reason = (
                "no such file" if missing else f"no such study; {did_you_mean(str(name), shipped)} (or name a file)"
            )
            raise UserError(f"{name}: {reason}")
        path = shipped[str(name)]
    try:
        fields = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a study's fields, such as `methods: [linear, spm]`")
    try:
        return Study.model_validate({**(replacements or Replacements()).over(fields), "source": path})
    except ValidationError as error:
        raise UserError(f"{path}: {_problem(error)}") from error


def _problem(error: ValidationError) -> str:
    """With the names that are known where the wrong field stands."""
    location = error.errors()[0]["loc"]
    known: Any = Study.model_fields
    for part, model in (("methods", MethodArm), ("backbones", BackboneArm), ("tune", Tune), ("overrides", Override)):
        if location and location[0] == part and len(location) > 1:
            known = model.model_fields
    return first_problem(error, known)
