"""A study file: methods × backbones × datasets × heads × seeds under one budget, checked and turned into requests.

`plan.py` reads its progress. Does not import torch.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.cells.resolve import Request
from harness.data.catalog import check_dataset
from harness.errors import InvalidField, UserError, did_you_mean, invalid, located
from harness.method import Method, methods
from harness.models.backbones.weights import find_weights
from harness.models.heads import parse_head
from harness.spec import Budget, Seed, budget, budget_from
from harness.util.files import read_yaml_file
from studies import shipped_studies
from studies.replacements import Replacements
from studies.search.samplers import check_sampler
from studies.search.spec import Range, Setting, check_names, parse_range
from studies.tune import HEAD_LR, HEAD_METHOD, HeadTune, Tune, ranges_from_lists, seeds_from_count


class _StudyModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


HEAD_ONLY = "head only"
MAX_CELLS = 100_000


def shown_label(label: str, heads: Iterable[str]) -> str:
    """A row's label as it is shown. `linear` is "head only" where one of the heads is more than a 1×1 convolution: then
    it is not a linear probe. Plans, filters and a report's data keep the label itself."""
    probe = label == HEAD_METHOD or label.startswith(f"{HEAD_METHOD}(")
    if not probe or all(head.partition(":")[0] == "linear" for head in heads):
        return label
    return HEAD_ONLY + label.removeprefix(HEAD_METHOD)


class MethodArm(_StudyModel):
    """One row of the table: a method, and the hyperparameters that differ from its defaults."""

    method: str = Field(description="its name; a row that is only a name is that method with its defaults")
    label: str = Field("", max_length=100, description="the row's name in tables; default: method and settings")
    settings: dict[str, Setting] = Field({}, description="hyperparameter -> value")
    space: dict[str, str] = Field({}, description="ranges of this row: each is searched, in place of `tune.space`'s")

    _from_lists = field_validator("space", mode="before")(ranges_from_lists)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, fields: Any) -> Any:
        return {"method": fields} if isinstance(fields, str) else fields

    @model_validator(mode="after")
    def _add_label(self) -> MethodArm:
        if self.label:
            return self
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return self.model_copy(update={"label": f"{self.method}({settings})" if settings else self.method})


class BackboneArm(_StudyModel):
    """A network and its weights."""

    backbone: str = Field(description="timm's name; an entry that is only a name has the weights `auto`")
    weights: str = Field("auto", description="as `--weights`; a path is relative to the file's folder")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, fields: Any) -> Any:
        return {"backbone": fields} if isinstance(fields, str) else fields


class Override(_StudyModel):
    """Hyperparameters for the cells that match every pattern (`*` and `?`)."""

    method: str = Field("*", description="pattern on the label or the method's name")
    backbone: str = Field("*", description="pattern on the name")
    dataset: str = Field("*", description="pattern on the name, as the study writes it")
    head: str = Field("*", description="pattern on head and width, such as `fpn:*`")
    settings: dict[str, Setting] = Field(min_length=1, description="hyperparameter -> value")

    def matches(self, arm: MethodArm, request: Request) -> bool:
        pairs = ((self.backbone, request.backbone), (self.dataset, request.dataset), (self.head, request.head))
        is_method = fnmatchcase(arm.label, self.method) or fnmatchcase(arm.method, self.method)
        return is_method and all(fnmatchcase(value, pattern) for pattern, value in pairs)


class Row(NamedTuple):
    """One row of a study's table."""

    arm: MethodArm
    request: Request
    head: Request
    """The cell with which `tune.head` searches: `linear` in the row's place, with the overrides that apply to it."""


class Study(_StudyModel):
    """The fields of a study file."""

    title: str = Field("", description="one line for people")
    budget: str | dict[str, Any] = Field("demo", description="name, .yaml file, or fields of a budget")
    methods: tuple[MethodArm, ...] = Field(min_length=1, description="rows: names, or fields")
    backbones: tuple[BackboneArm, ...] = Field(min_length=1, description="names, or fields")
    datasets: tuple[str, ...] = Field(
        min_length=1, description="as `--dataset`; a path is relative to the file's folder"
    )
    heads: tuple[str, ...] = Field(("fpn",), min_length=1, description="as `--head`")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, description="a list, or a number of seeds from 0")
    tune: Tune | None = Field(None, description="searches before the seeds are run; default: none")
    overrides: tuple[Override, ...] = Field((), description="settings for the cells that match, the last one wins")
    source: Path = Field(Path("study.yaml"), exclude=True, description="the file; paths are relative to its folder")
    flags: frozenset[str] = Field(frozenset(), exclude=True, description="keys that the command line replaces")

    _from_count = field_validator("seeds", mode="before")(seeds_from_count)

    @model_validator(mode="after")
    def _check_unique(self) -> Study:
        cells = 1
        for field, values in (
            ("methods", [arm.label for arm in self.methods]),
            ("backbones", [f"{arm.backbone} with weights {arm.weights}" for arm in self.backbones]),
            ("datasets", self.datasets),
            ("heads", self.heads),
            ("seeds", self.seeds),
        ):
            counts = Counter(values)
            cells *= len(counts)
            twice = next((value for value, count in counts.items() if count > 1), None)
            if twice is not None:
                hint = "; set a `label` for each row of a method" if field == "methods" else ""
                raise InvalidField(field, f"is listed twice{hint}", twice)
        if cells > MAX_CELLS:
            raise ValueError(f"{cells:,} cells; use at most {MAX_CELLS:,} in one study")
        return self

    @property
    def name(self) -> str:
        return self.source.stem

    def the_budget(self) -> Budget:
        """The budget of all cells. Raises `UserError`."""
        if isinstance(self.budget, dict):
            with self._located(under="budget"):
                return budget_from(self.budget, self.name)
        with self._located("budget"):
            return budget(self._path(self.budget) if self.budget.endswith((".yaml", ".yml")) else self.budget)

    def check(self, data: Path, cache: Path) -> None:
        """Check every name, hyperparameter and range of the study, but not the datasets' files.

        Raises `UserError` that names the study file and its key, or a flag.
        """
        self.the_budget()
        for row, arm in enumerate(self.methods):
            with self._located("methods"):
                method = methods.get(arm.method)
            with located(self.source, under=self._place(row)):  # a row of a flag that is not in the file has no fields
                method.Hyperparameters.parse(arm.method, dict(arm.settings))
                self._check_space(method, arm)
        for backbone in self.backbones:
            with self._located("backbones"):
                find_weights(backbone.backbone, "random", cache)  # only the name: its weights may be missing
        for dataset in self.datasets:
            with self._located("datasets"):
                try:
                    check_dataset(self._dataset(dataset), data)
                except UserError as error:
                    if self.source in shipped_studies().values() and "datasets" not in self.flags:
                        error.hint = "the comment at the top of the file says how to get it, or give --dataset"
                    raise
        for head in self.heads:
            with self._located("heads"):
                parse_head(head)
        self._check_overrides()
        self._check_tune()

    def _place(self, row: int) -> str:
        """What errors call a row: its number in the file, or its label where flags chose the rows."""
        return f"methods[{self.methods[row].label if 'methods' in self.flags else row}]"

    def _check_space(self, method: type[Method], arm: MethodArm) -> None:
        for name, text in arm.space.items():
            parse_range(method, name, text)
            if name in arm.settings:
                raise UserError("is in `settings` too", field=f"space.{name}", value=text, hint="remove one of them")
        if arm.space and self.tune is None and "tune" not in self.flags:
            raise UserError("the study has no `tune`, so nothing is searched", field="space")

    def _check_overrides(self) -> None:
        """Their settings fit, and each matches a cell. Where the command line chose the cells, it need not."""
        used: set[int] = set()
        for arm, request in self._rows(self.the_budget()):
            for number, override in self._matching(arm, request):
                used.add(number)
                with located(self.source, under=f"overrides[{number}]"):
                    methods.get(arm.method).Hyperparameters.parse(arm.method, dict(override.settings))
                    if both := [name for name in override.settings if name in arm.space]:
                        problem = f"the row {arm.label} searches it, in its `space`"
                        raise UserError(problem, field=f"settings.{both[0]}", hint="remove one of them")
            if self.tune is not None and self.tune.head is not None:
                of_head = self._matching(MethodArm(method=HEAD_METHOD, label=HEAD_METHOD), request)
                used |= {number for number, _ in of_head}
        for number in range(len(self.overrides)):
            if number not in used and not self.flags & {"methods", "backbones", "datasets", "heads"}:
                patterns = self.overrides[number].model_dump(exclude={"settings"}, exclude_defaults=True)
                problem = f"no cell of the study matches {patterns}"
                raise UserError(problem, field=f"overrides[{number}]").at(self.source)

    def _check_tune(self) -> None:
        if self.tune is None:
            return
        with located(self.source, under="tune"):
            self._check_names_to_tune(self.tune)
            check_names(self.tune.sampler, self.tune.pruner)
            if self.tune.head is not None:
                self._check_head(self.tune)
            for row in self.rows():
                try:
                    self._check_sampler(self.tune.space_of(row.request, row.arm.space), self.tune.trials)
                except UserError as error:
                    if row.arm.space:
                        error.problem = f"the row {row.arm.label}: {error.problem}"
                        if error.field == "trials":
                            error.hint = "give it as many values, or omit `sampler`"
                    raise

    def _check_names_to_tune(self, tune: Tune) -> None:
        """Each name belongs to a method of the file. Where the command line chose the methods, any method will do."""
        own = [methods.get(arm.method) for arm in self.methods]
        every = [methods.get(name) for name in methods.names()] if "methods" in self.flags else own
        known = {name for method in every for name in method.Hyperparameters.model_fields}
        for key, names in (("parameters", tune.parameters or ()), ("space", tune.space)):
            for name in names:
                if name not in known:
                    hint = did_you_mean(name, known)
                    raise UserError("no method of the study has it", field=key, value=name, hint=hint)
        for name, text in tune.space.items():
            for method in own:
                if name in method.Hyperparameters.model_fields:
                    parse_range(method, name, text)

    def _check_head(self, tune: Tune) -> None:
        """`tune.head` is valid, and nothing else sets `head_lr`."""
        assert tune.head is not None
        fixed = [self._place(row) for row, arm in enumerate(self.methods) if HEAD_LR in arm.settings]
        fixed += [f"overrides[{number}]" for number, one in enumerate(self.overrides) if HEAD_LR in one.settings]
        fixed = [f"{HEAD_LR} in the settings of {place}" for place in fixed]
        fixed += [f"the space of {self._place(row)}" for row, arm in enumerate(self.methods) if HEAD_LR in arm.space]
        fixed += [f"tune.{key}" for key in ("parameters", "space") if HEAD_LR in (getattr(tune, key) or ())]
        if fixed:
            problem = f"tunes {HEAD_LR} for every row, and {fixed[0]} sets it too"
            raise UserError(problem, field="head", hint="remove one of them")
        if tune.head.space is not None:
            with located(under="head"):
                parse_range(methods.get(HEAD_METHOD), HEAD_LR, tune.head.space, field="space")
        self._check_sampler(tune.head_space(), tune.head.trials, "head.")

    def _check_sampler(self, space: dict[str, Range], trials: int, prefix: str = "") -> None:
        assert self.tune is not None
        if space:
            try:
                check_sampler(self.tune.sampler_of(space), space, self.tune.trials_of(space, trials))
            except UserError as error:
                if error.field == "trials":
                    error.field = f"{prefix}trials"
                raise

    def rows(self) -> Iterator[Row]:
        """Every row of the table with its settings and the study's first seed, a placeholder for other seeds."""
        for arm, request in self._rows(self.the_budget()):
            head = replace(request, method=HEAD_METHOD, settings={})
            known = methods.get(HEAD_METHOD).Hyperparameters.model_fields
            for _, override in self._matching(MethodArm(method=HEAD_METHOD, label=HEAD_METHOD), head):
                head.settings.update({name: value for name, value in override.settings.items() if name in known})
            for _, override in self._matching(arm, request):
                request.settings.update(override.settings)
            dataset = self._dataset(request.dataset)
            yield Row(arm, replace(request, dataset=dataset), replace(head, dataset=dataset))

    def _rows(self, chosen: Budget) -> Iterator[tuple[MethodArm, Request]]:
        """Rows without overrides; datasets by the names in the study, which overrides match."""
        for backbone, dataset, head, arm in itertools.product(
            self.backbones, self.datasets, self.heads, self.methods
        ):  # fmt: skip
            yield (
                arm,
                Request(
                    method=arm.method,
                    backbone=backbone.backbone,
                    weights=self._weights(backbone.weights),
                    dataset=dataset,
                    head=head,
                    budget=chosen,
                    seed=self.seeds[0],
                    settings=dict(arm.settings),
                ),
            )

    def _matching(self, arm: MethodArm, request: Request) -> Iterator[tuple[int, Override]]:
        return ((number, one) for number, one in enumerate(self.overrides) if one.matches(arm, request))

    def _located(self, key: str | None = None, *, under: str = "") -> AbstractContextManager[None]:
        """Errors raised inside name the study's file, unless the value came from a flag."""
        top = (key or under).partition("[")[0]
        return located() if top in self.flags else located(self.source, key=key, under=under or None)

    def _weights(self, weights: str) -> str:
        is_word = weights in ("auto", "random") or weights.startswith("package:")
        return weights if is_word else self._path(weights)

    def _dataset(self, dataset: str) -> str:
        return self._path(dataset) if "/" in dataset or dataset.endswith((".yaml", ".yml")) else dataset

    def _path(self, path: str) -> str:
        return str(self.source.parent / Path(os.path.expanduser(path)))


def load_study(name: str | Path, replacements: Replacements | None = None) -> Study:
    """A study file, or a shipped study by its name. `Study.check` then checks the names in it.

    Raises `UserError` that names the file and the field.
    """
    path = Path(name)
    if not os.path.isfile(path):  # False for a name that no file can have
        shipped = shipped_studies()
        if str(name) not in shipped:
            if path.suffix in (".yaml", ".yml"):
                raise UserError("no such file", field="study", value=name).at(name)
            raise UserError(f"no such study; {did_you_mean(str(name), shipped)} (or name a file)").at(name)
        path = shipped[str(name)]
    fields = read_yaml_file(path)
    if not isinstance(fields, dict):
        raise UserError("expected the fields of a study, such as `methods: [linear, spm]`").at(path)
    for reserved in {"source", "flags"} & set(fields):
        raise UserError("no such field", field=reserved).at(path)
    try:
        return Study.model_validate({**(replacements or Replacements()).over(fields), "source": path})
    except ValidationError as error:
        raise invalid(error, _known_fields(error)).at(path) from error


def _known_fields(error: ValidationError) -> set[str]:
    """The known fields of the part of a study that has the first error."""
    location = error.errors()[0]["loc"]
    parts: dict[Any, type[BaseModel]] = {
        "methods": MethodArm,
        "backbones": BackboneArm,
        "tune": HeadTune if location[1:2] == ("head",) else Tune,
        "overrides": Override,
    }
    model = parts.get(location[0], Study) if len(location) > 1 else Study
    return set(model.model_fields) - {"source", "flags"}
