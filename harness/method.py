"""The contract of a tuning method. A method is one class in one file; the shipped ones are in `methods/`.

Neither this module nor the top of a shipped method imports torch, so that a study is planned without it.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from harness.errors import UserError, did_you_mean, invalid, shown
from harness.spec import Budget
from harness.util.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.models.backbones.backbone import StagedBackbone


def _in_a_file(name: str, near: bool) -> str:
    """The hint at `--plugin`: for a file of the method's name, or where no known method is near."""
    file = Path(f"{name}.py")
    if os.path.isfile(file):
        loaded = {getattr(module, "__file__", None) for module in sys.modules.values()}
        return "" if str(file.resolve()) in loaded else f" (or load {shown(file)} with --plugin {shown(file)})"
    return "" if near else " (or load its file with --plugin FILE)"


methods: Registry[type[Method]] = Registry("method", group="harness.methods", elsewhere=_in_a_file)


def hyperparameter(default: Any, help: str, *, search: Any = None, later: bool = False, **bounds: Any) -> Any:
    """One hyperparameter: its default, one line of help, its bounds, and the range that a search draws from.

    `bounds` are pydantic's (`gt`, `ge`, `lt`, `le`, `pattern`). `search` is `(low, high)`, `(low, high, "log")` or a
    list of choices; None: it is not searched. `later` marks one that was added when runs of the method existed: its
    default is the earlier behaviour and is left out of specs, so that those runs stay valid.
    """
    return Field(default, description=help, json_schema_extra={"search": search, "later": later}, **bounds)


class HeadHyperparameters(BaseModel):
    """The hyperparameters of a method that trains nothing but the head."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    head_lr: float = hyperparameter(
        3e-3, "learning rate of the head (AdamW), the same for every row of a table", gt=0, le=10,
        search=(1e-4, 1e-1, "log"),
    )  # fmt: skip
    weight_decay: float = hyperparameter(
        0.01, "decoupled weight decay of the weights of linear and convolutional layers", ge=0, le=1,
        search=(1e-4, 0.1, "log"),
    )  # fmt: skip

    @property
    def main_lr(self) -> float:
        """The learning rate that curves and messages show: the method's, or the head's if only the head is trained."""
        return self.head_lr

    @classmethod
    def parse(cls, method: str, settings: dict[str, Any]) -> Self:
        """The defaults, overridden by `settings`; strings are read as the field's type.

        Raises `UserError`, of the field `settings.NAME`, for a name that does not exist or a value out of its bounds.
        """
        for name in settings:
            if name not in cls.model_fields:
                hint = cls._replacement(name, settings)
                if name in Budget.model_fields:
                    hint = "it is a field of the budget"
                hint = hint or did_you_mean(name, cls.model_fields)
                raise UserError(f"no such hyperparameter of method {method}", field=f"settings.{name}", hint=hint)
        for name, value in settings.items():
            if isinstance(value, bool) and cls.model_fields[name].annotation in (int, float):  # pydantic reads it as 1
                raise UserError("expected a number", field=f"settings.{name}", value=value)
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise invalid(error).at(under="settings") from error

    @classmethod
    def _replacement(cls, name: str, settings: dict[str, Any]) -> str | None:
        """What to write in place of a hyperparameter that was removed, or that the method has no use for."""
        if name not in ("lr", "head_lr_scale"):
            return None
        old = [settings[part] for part in ("lr", "head_lr_scale") if part in settings]
        try:  # the head's rate was their product; lr had another default in each method
            value = f"={math.prod(map(float, old)):g}" if "lr" in settings else ""
        except (TypeError, ValueError):
            value = ""
        if name == "lr":
            return f"it trains only the head; use head_lr{value}"
        return f"use head_lr{value}, the head's own learning rate, which lr does not change"

    def spec_values(self) -> dict[str, bool | int | float | str]:
        """The values in the spec and the fingerprint: all except `later` ones at their defaults."""
        omitted = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict)
            and field.json_schema_extra.get("later")
            and getattr(self, name) == field.default
        }
        return self.model_dump(exclude=omitted)

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """Each hyperparameter's name, type, default, bounds, help and search range, as plain values."""
        described = []
        for name, schema in cls.model_json_schema()["properties"].items():
            default = cls.model_fields[name].default
            described.append(
                {
                    "name": name,
                    "type": schema.get("type", "choice"),
                    "default": None if default is PydanticUndefined else default,
                    "bounds": {key: schema[key] for key in _BOUNDS if key in schema},
                    "help": schema.get("description", ""),
                    "search": schema.get("search"),
                }
            )
        return described


class Hyperparameters(HeadHyperparameters):
    """The hyperparameters of every other method, set with `--set`; its own class adds fields or changes a default."""

    lr: float = hyperparameter(
        1e-3, "learning rate of the method's parameters (AdamW)", gt=0, le=10, search=(1e-5, 1e-2, "log")
    )

    @property
    def main_lr(self) -> float:
        return self.lr


_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "pattern", "enum")
"""The keys of a JSON schema that are bounds."""


class Unsupported(str):
    """The falsy answer of `Method.supports`: `Unsupported("why not")`, the reason as tables print it."""

    def __bool__(self) -> bool:
        return False


class Method(ABC):
    """A way to adapt a frozen backbone: what it adds and what it un-freezes.

    The harness creates a backbone in which every parameter and buffer is frozen, calls `attach` once, trains whatever
    requires a gradient together with the head, and stores exactly that as the delta. It guarantees that the head, the
    data and their order, and every number of the budget are the same for all methods; a method sees none of them.
    One instance serves one network.

    A subclass sets `name`, `summary`, `source` and, if it has any of its own, its `Hyperparameters`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    """The paper, or the code, that the method follows."""
    Hyperparameters: ClassVar[type[HeadHyperparameters]] = Hyperparameters
    changes_start: ClassVar[str | None] = None
    """Why the attached network's outputs differ from the frozen one's before training; None: they are equal."""
    head_only: ClassVar[bool] = False
    """Whether the method is meant to train only the head at its defaults. Another method must train something."""
    decayed: ClassVar[tuple[str, ...]] = ()
    """Names of trained parameters, or of modules that hold them, with weight decay beside the weights of linear and
    convolutional layers, which always have it: the factors of a weight, for example."""
    mergeable: ClassVar[bool] = False
    """Whether `merge` can fold the trained tensors into the backbone's own layers."""

    hyperparameters: Any
    """An instance of the class's own `Hyperparameters`."""

    def __init__(self, hyperparameters: Any):
        self.hyperparameters = hyperparameters

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        """True, or `Unsupported(reason)`. Called before `attach`; must not change the backbone."""
        return True

    @abstractmethod
    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        """Insert modules into the frozen backbone (see `AttachPoints`) and unfreeze the parameters to train.

        Random initialisation draws from torch's global generator, which the harness has seeded.
        """

    @abstractmethod
    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        """Number of parameters that `attach` makes trainable, in closed form. Checked against the real count."""

    def auxiliary_loss(self, masks: Tensor) -> Tensor | None:
        """A scalar that is added to the head's loss after each training forward pass; None adds nothing.

        `masks` are the labels [B, H', W'] on the backbone's canvas, which every map covers exactly, with `IGNORE_INDEX`
        where there are none: `losses.labels_at` samples them at a map's size.
        """
        return None

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Classifiers that the method adds: they learn at `head_lr`, as the head does. Called after `attach`."""
        return ()

    def merge(self, backbone: StagedBackbone) -> None:
        """Fold the trained tensors into the backbone's own layers and remove the added modules.

        Afterwards the backbone has the modules and names of a pre-trained one, and computes what it computed before.
        Only called where `mergeable`.
        """
        raise TypeError(f"{self.name} cannot be merged into a backbone")


def __getattr__(name: str) -> Any:
    """Old names, for plugins written for version 0.1; removed in version 0.3."""
    renamed = {"No": "Unsupported", "knob": "hyperparameter"}
    if name not in renamed:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"harness.method.{name} is now {renamed[name]}", DeprecationWarning, stacklevel=2)
    return globals()[renamed[name]]
