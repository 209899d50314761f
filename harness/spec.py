"""The spec of a run: one cell of the benchmark (`Spec`), and the budget that all cells of a table share (`Budget`).

Both are validated, immutable and complete: no default elsewhere can change a score.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.errors import InvalidField, UserError, did_you_mean, invalid, located
from harness.util.files import digest, read_yaml, read_yaml_file

PROTOCOL = 2
"""Part of every fingerprint. Increased when a change of the harness would change the scores of equal specs.

2: the head has a learning rate of its own; predictions are aligned to the pixel with the padded image; weight decay
applies to the weights of linear and convolutional layers only; no gradient clipping and no stochastic depth by default.
"""

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Part = Literal["report", "dev"]
"""`report`: train on the train split, evaluate once on the test split. `dev`: evaluate on the dev split, or on a part
that is held out of train; see `harness/data/splits.py`."""


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Integer = Annotated[int, BeforeValidator(_no_boolean)]
Real = Annotated[float, BeforeValidator(_no_boolean)]
"""pydantic reads true as 1."""
Seed = Annotated[Integer, Field(ge=0, lt=2**31)]
_LARGEST_SIDE = 16_384  # pixels
_SCALES = 0.01, 20.0
_ADDED: Mapping[str, Any] = {"train_fraction": 1.0, "compile": False}
"""Fields of the budget that were added since protocol 2, with the value that stands for how it was before."""


class Budget(BaseModel):
    """The budget of every method in a table: steps, batches, crops, schedule, evaluation. See `budgets.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    steps: Integer = Field(ge=1, le=10**9, description="optimiser steps")
    batch_size: Integer = Field(ge=1, le=65_536, description="images per optimiser step, over all processes")
    accumulate: Integer = Field(1, ge=1, description="forward passes that the images of a step are divided into")
    crop: tuple[Integer, Integer] = Field(description="height, width of a training crop, pixels")
    resize: tuple[float, float] = Field((0.5, 2.0), description="random scale before the crop, uniform")
    flip: Real = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    photometric: bool = Field(True, description="random brightness, contrast, saturation and hue")
    warmup: Integer = Field(0, ge=0, description="steps of linear warm-up")
    power: Real = Field(0.9, gt=0, le=100, description="exponent of the polynomial decay of the learning rate to zero")
    clip_norm: Real = Field(0.0, ge=0, description="largest gradient norm over all trained tensors; 0: no clipping")
    drop_path: Real = Field(
        0.0, ge=0, lt=1, description="stochastic depth of the last block, rising from 0 at the first; for every method"
    )
    auxiliary_head: Real = Field(
        0.0,
        ge=0,
        le=10,
        description="weight of the loss of an FCN head on the third stage in training; 0: none",
    )
    precision: Precision = Field(
        "fp32",
        description="tf32: float32 with a GPU's matrix products of reduced precision, the same as fp32 on a CPU; bf16 "
        "and fp16 are autocast of the forward pass",
    )
    channels_last: bool = Field(
        False,
        description="memory layout of feature maps in CNNs; selects other kernels, faster on most devices, that differ "
        "in the last bits",
    )
    compile: bool = Field(
        False,
        description="training steps through torch.compile, which takes up to minutes at the start of a run and selects "
        "other kernels that differ in the last bits; outputs of frozen stages are then neither cached nor shared",
    )
    dev_fraction: Real = Field(
        0.2, gt=0, lt=1, description="share of train that is held out as dev, if the dataset has no dev split"
    )
    train_fraction: Real = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the images to train on that a run uses, drawn by its seed: the same for every method",
    )
    evaluation: Literal["whole", "slide"] = Field("whole", description="whole images, or windows of `crop` size")
    stride: tuple[int, int] | None = Field(None, description="height, width between windows of `slide`")

    @field_validator("clip_norm", mode="before")
    @classmethod
    def _check_clip_norm(cls, norm: Any) -> Any:
        if norm is None or norm == float("inf"):
            raise ValueError("use 0 for no clipping")
        return norm

    @field_validator("crop", mode="before")
    @classmethod
    def _check_two_sides(cls, crop: Any) -> Any:
        if not isinstance(crop, list | tuple) or len(crop) != 2:
            raise ValueError("use [height, width] in pixels")
        return crop

    @field_validator("crop")
    @classmethod
    def _check_crop(cls, crop: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= min(crop) <= max(crop) <= _LARGEST_SIDE:
            raise ValueError(f"invalid size; use [height, width] in pixels, 1 to {_LARGEST_SIDE:,}")
        return crop

    @field_validator("resize")
    @classmethod
    def _check_resize(cls, resize: tuple[float, float]) -> tuple[float, float]:
        if not 0 < resize[0] <= resize[1]:
            raise ValueError("invalid range; use [lowest, highest] scale, both above 0")
        if resize[0] < _SCALES[0] or resize[1] > _SCALES[1]:
            raise ValueError(f"invalid range; use scales of {_SCALES[0]:g} to {_SCALES[1]:g}")
        return resize

    @model_validator(mode="after")
    def _check_consistency(self) -> Budget:
        if self.batch_size % self.accumulate:
            problem = f"does not divide the batch_size, {self.batch_size}"
            raise InvalidField("accumulate", problem, self.accumulate)
        if self.warmup >= self.steps:
            raise InvalidField("warmup", f"leaves none of the {self.steps} steps; use fewer", self.warmup)
        if self.evaluation == "slide":
            if self.stride is None:
                raise InvalidField("stride", "is missing; slide evaluation needs [height, width] between windows")
            if not all(0 < s <= c for s, c in zip(self.stride, self.crop, strict=True)):
                problem = f"leaves gaps between windows; use 1 to the crop, {list(self.crop)}"
                raise InvalidField("stride", problem, list(self.stride))
        elif self.stride is not None:
            raise InvalidField("stride", "is only for `evaluation: slide`", list(self.stride))
        return self

    def identity(self) -> dict[str, Any]:
        """The fields that can change a score, as plain values: all but the name, and but for those that a later version
        added and that are at their defaults."""
        fields = self.model_dump(mode="json", exclude={"name"})
        return {name: value for name, value in fields.items() if name not in _ADDED or value != _ADDED[name]}

    def learning_rate_factor(self, step: int) -> float:
        """The factor on the base learning rate at `step` (0-based): linear warm-up, then polynomial decay."""
        decay = (1 - step / self.steps) ** self.power
        return decay * min(1.0, (step + 1) / (self.warmup + 1))


class Spec(BaseModel):
    """One cell: a method with its hyperparameters, a backbone with its weights, a dataset, a head, a budget, a seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    hyperparameters: dict[str, bool | int | float | str] = Field(
        description="all; one that a later version added is left out at its default"
    )
    method_code: str = Field("", description="digest of a plugin's code; empty for a shipped method")
    backbone: str
    weights: str = Field(description="identity of the pre-trained weights, never a path")
    dataset: str
    data_digest: str = Field(description="SHA-256 of everything about the data that can change a result")
    head: str
    budget: Budget
    seed: Seed
    part: Part = "report"
    protocol: int = Field(1, ge=1, description="`PROTOCOL` of the version that made the spec; version 0.1 wrote none")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over exactly the fields that can change a score: never device, workers or paths.

        The names of budget and dataset are left out: only their contents change a score.
        """
        return digest(
            {
                "protocol": self.protocol,
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
            }
        )[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str) -> Spec:
        """Parse the text of `to_yaml`. Raises `ValueError` for text that is not YAML or not a complete spec."""
        return cls.model_validate(read_yaml(text))


class SharedDataKey(NamedTuple):
    """Everything that determines a frozen backbone's training inputs: runs with equal keys can share its outputs."""

    backbone: str
    weights: str
    data: str
    budget: Budget
    seed: int
    part: Part

    @classmethod
    def of(cls, spec: Spec) -> SharedDataKey:
        return cls(spec.backbone, spec.weights, spec.data_digest, spec.budget, spec.seed, spec.part)


@cache
def budgets() -> dict[str, Budget]:
    """The budgets that ship with the harness, by name."""
    text = resources.files("harness").joinpath("budgets.yaml").read_text(encoding="utf-8")
    return {name: Budget(name=name, **fields) for name, fields in read_yaml(text).items()}


def budget(name: str) -> Budget:
    """A shipped budget by its name, or the one in a YAML file by its path.

    Raises `UserError` for an unknown name or a missing file (of the field `budget`), or a wrong field in the file.
    """
    if name in budgets():
        return budgets()[name]
    if not name.endswith((".yaml", ".yml")):
        hint = f"{did_you_mean(name, budgets())} (or name a .yaml file)"
        raise UserError("no such budget", field="budget", value=name, hint=hint)
    path = Path(name)
    fields = read_yaml_file(path, "budget")
    with located(path):
        return budget_from(fields, path.stem)


def budget_from(fields: Any, name: str) -> Budget:
    """The budget called `name` with these fields. `base: NAME` among them names a shipped budget to start from.

    Raises `UserError` of the wrong field; the caller adds where the fields come from.
    """
    if not isinstance(fields, Mapping):
        raise UserError("expected the fields of a budget, such as `steps: 1000`")
    if "name" in fields:
        raise UserError(f"no such field; this budget is called {name}", field="name")
    fields = dict(fields)
    base = fields.pop("base", None)
    if base is not None:
        if str(base) not in budgets():
            raise UserError("no such budget", field="base", value=base, hint=did_you_mean(str(base), budgets()))
        fields = budgets()[str(base)].model_dump() | fields
    try:
        return Budget.model_validate({**fields, "name": name})
    except ValidationError as error:
        raise invalid(error, Budget.model_fields) from error
