"""The base of methods that train tensors of the backbone itself and add none: full, partial, bias, norm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from torch import nn

    from harness.models.backbones.backbone import StagedBackbone


class Selection(Method):
    """Un-freezes what `selected` chooses. Nothing needs merging: the trained tensors are the backbone's own."""

    mergeable: ClassVar[bool] = True
    nothing_selected: ClassVar[str] = "the network has no such tensors"
    """The reason where `selected` chooses nothing."""

    @abstractmethod
    def selected(self, backbone: StagedBackbone) -> Sequence[nn.Module | nn.Parameter]:
        """Parameters, or modules with everything in them, running statistics included."""

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        return True if self.selected(backbone) else Unsupported(self.nothing_selected)

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        backbone.unfreeze(*self.selected(backbone))

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        """The sum of the selected tensors' sizes."""
        return sum(parameter.numel() for parameter in _parameters(self.selected(backbone)))

    def merge(self, backbone: StagedBackbone) -> None:
        """Nothing to do."""


class ModuleSelection(Selection):
    """Selects whole modules. Its hyperparameter `statistics` decides on their batch norms: `train` normalises by the
    batch and updates the running statistics; `frozen` normalises by the pre-trained ones, and trains scale and shift.

    On a network without batch norms the two are equal. A search still draws the value there, since ranges are read
    without building a network. A random or TPE trial is not wasted, as its other values differ, but a grid has every
    point twice: leave the hyperparameter out of such a grid (`parameters`).
    """

    @abstractmethod
    def modules(self, backbone: StagedBackbone) -> list[nn.Module]: ...

    def selected(self, backbone: StagedBackbone) -> Sequence[nn.Module | nn.Parameter]:
        modules = self.modules(backbone)
        return list(_parameters(modules)) if self.hyperparameters.statistics == "frozen" else modules


def statistics() -> Any:
    """The hyperparameter of methods that un-freeze whole modules."""
    return hyperparameter(
        "train",
        "batch norms: update their running statistics, or keep the pre-trained ones",
        search=["train", "frozen"],
    )


def _parameters(selected: Sequence[nn.Module | nn.Parameter]) -> Iterator[nn.Parameter]:
    from torch import nn

    for target in selected:
        yield from target.parameters() if isinstance(target, nn.Module) else (target,)
