"""What is run: one cell of the benchmark (`Spec`) and what is equal for all cells of a table (`Budget`).

Both are validated, immutable and complete: nothing that can change a figure is left to a default elsewhere.
"""

from __future__ import annotations

import os
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.errors import UserError, did_you_mean
from harness.util.files import digest

PROTOCOL = 1
"""Part of every fingerprint. Raised when the harness itself changes so that figures of equal specs would differ."""

Precision = Literal["fp32", "bf16", "fp16"]
Part = Literal["report", "dev"]
"""`report`: train on all of train, evaluate once on test. `dev`: hold a dev part out of train and evaluate on it."""


class Budget(BaseModel):
    """Everything that is equal for every method of a table. Named in `budgets.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    steps: int = Field(ge=1, description="optimiser steps")
    batch_size: int = Field(ge=1, description="images per optimiser step, over all processes")
    accumulate: int = Field(1, ge=1, description="forward passes that one step's images are divided into")
    crop: tuple[int, int] = Field(description="height, width of a training crop, pixels")
    resize: tuple[float, float] = Field((0.5, 2.0), description="random scale before the crop, uniform")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    photometric: bool = Field(True, description="random brightness, contrast, saturation and hue")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    power: float = Field(0.9, gt=0, description="exponent of the polynomial decay of the learning rate to zero")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm over all trained tensors; 0 is no clipping")
    precision: Precision = Field("fp32", description="of the forward pass; bf16 and fp16 are autocast")
    channels_last: bool = Field(
        False,
        description="memory layout of maps in convolutional networks: other, on most devices faster kernels, of which "
        "the last bits differ",
    )
    dev_fraction: float = Field(0.2, gt=0, lt=1, description="share of train held out when a search selects")
    evaluation: Literal["whole", "slide"] = Field("whole", description="whole images, or windows of `crop` size")
    stride: tuple[int, int] | None = Field(None, description="height, width between windows of `slide`")

    @model_validator(mode="after")
    def _consistent(self) -> Budget:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if not 0 < self.resize[0] <= self.resize[1]:
            raise ValueError(f"resize {list(self.resize)} is not an increasing range of positive scales")
        if min(self.crop) < 1:
            raise ValueError(f"crop {list(self.crop)} is not a size")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup {self.warmup} leaves none of {self.steps} steps")
        if self.evaluation == "slide":
            if self.stride is None or not all(0 < s <= c for s, c in zip(self.stride, self.crop, strict=True)):
                raise ValueError("slide evaluation needs a stride between 1 and the crop, so that windows cover all")
        elif self.stride is not None:
            raise ValueError("a stride belongs to slide evaluation")
        return self

    def identity(self) -> dict[str, Any]:
        """The fields that can change a figure, as plain values. What came later is left out where it changes nothing:
        older fingerprints stay what they were."""
        return self.model_dump(mode="json", exclude={"name"} | (set() if self.channels_last else {"channels_last"}))

    def learning_rate_factor(self, step: int) -> float:
        """What the base learning rate is multiplied by at `step` (0-based): linear warm-up, then polynomial decay."""
        decay = (1 - step / self.steps) ** self.power
        return decay * min(1.0, (step + 1) / (self.warmup + 1))


class Spec(BaseModel):
    """One cell: a method with its hyperparameters, a backbone with its weights, a dataset, a head, a budget, a seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    hyperparameters: dict[str, bool | int | float | str]
    method_code: str = Field("", description="digest of the method's code where it is not of this project")
    backbone: str
    weights: str = Field(description="identity of the pre-trained weights, never a path")
    dataset: str
    data_digest: str
    head: str
    budget: Budget
    seed: int = Field(ge=0, lt=2**31)
    part: Part = "report"

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over exactly the fields that can change a figure: never device, workers or paths.

        The budget's name is left out: two budgets that are equal but for their names give the same figures.
        """
        return digest(
            {
                "protocol": PROTOCOL,
                "method": self.method,
                "hyperparameters": self.hyperparameters,
                **({"method_code": self.method_code} if self.method_code else {}),
                "backbone": self.backbone,
                "weights": self.weights,
                "data": self.data_digest,
                "head": self.head,
                "budget": self.budget.identity(),
                "seed": self.seed,
                "part": self.part,
                # Which windows go through the network together can move the last bits of what it puts out.
                **({"windows": "together"} if self.budget.evaluation == "slide" else {}),
            }
        )[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str) -> Spec:
        """Raises `ValueError` where the text is not a complete spec."""
        try:
            return cls.model_validate(read_yaml(text))
        except yaml.YAMLError as error:
            raise ValueError(f"not YAML: {error}") from error


class SharedDataKey(NamedTuple):
    """What decides which images a frozen backbone sees in training. Runs of which it is the same can share its work."""

    backbone: str
    weights: str
    data: str
    budget: Budget
    seed: int
    part: Part

    @classmethod
    def of(cls, spec: Spec) -> SharedDataKey:
        return cls(spec.backbone, spec.weights, spec.data_digest, spec.budget, spec.seed, spec.part)


def read_yaml(text: str) -> Any:
    """As `yaml.safe_load`, by libyaml where it is there: ten times as fast, which a thousand specs notice."""
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@cache
def budgets() -> dict[str, Budget]:
    """The budgets that ship with the harness, by name."""
    text = resources.files("harness").joinpath("budgets.yaml").read_text(encoding="utf-8")
    return {name: Budget(name=name, **fields) for name, fields in yaml.safe_load(text).items()}


def budget(name: str) -> Budget:
    """A shipped budget by name, or the one in a YAML file whose path is given, as `budget_from` reads it.

    Raises `UserError` for an unknown name, a missing file, or a field that does not exist or does not fit.
    """
    if name in budgets():
        return budgets()[name]
    if not name.endswith((".yaml", ".yml")):
        raise UserError(f"--budget {name}: no such budget; {did_you_mean(name, budgets())} (or name a .yaml file)")
    path = Path(name)
    try:
        fields: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--budget {name}: {os.strerror(error.errno or 0)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--budget {name}: not YAML: {' '.join(str(error).split())}") from error
    return budget_from(fields, path.stem, f"--budget {name}")


def budget_from(fields: Any, name: str, said: str) -> Budget:
    """The budget of that name with these fields; `base: NAME` among them takes a shipped one and states what differs.

    Raises `UserError`, which begins with `said`: where the fields were given.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{said}: expected fields of a budget, such as `steps: 1000`")
    if "name" in fields:
        raise UserError(f"{said}: name: no such field; the budget is called {name}")
    fields = dict(fields)
    base = fields.pop("base", None)
    if base is not None:
        if str(base) not in budgets():
            raise UserError(f"{said}: base: no budget {base!r}; {did_you_mean(str(base), budgets())}")
        fields = budgets()[str(base)].model_dump() | fields
    try:
        return Budget.model_validate({**fields, "name": name})
    except ValidationError as error:
        raise UserError(f"{said}: {first_problem(error, Budget.model_fields)}") from error


def first_problem(error: ValidationError, known: Any) -> str:
    """The first complaint of a pydantic error as one clause: the field, what is wrong with it, what would fit."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{field}: no such field; {did_you_mean(field, known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("missing", "value_error"):
        return f"{field}: {message}" if field else message
    return f"{field}: {problem['input']!r}: {message[0].lower()}{message[1:]}"
