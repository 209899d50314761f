"""The base of methods that train tensors of the backbone itself and add none: full, partial, bias, norm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from harness.method import Method, Unsupported

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
    """Selects whole modules; their running statistics move unless `freeze_statistics` is set."""

    @abstractmethod
    def modules(self, backbone: StagedBackbone) -> list[nn.Module]: ...

    def selected(self, backbone: StagedBackbone) -> Sequence[nn.Module | nn.Parameter]:
        modules = self.modules(backbone)
        return list(_parameters(modules)) if self.hyperparameters.freeze_statistics else modules


def _parameters(selected: Sequence[nn.Module | nn.Parameter]) -> Iterator[nn.Parameter]:
    from torch import nn

    for target in selected:
        yield from target.parameters() if isinstance(target, nn.Module) else (target,)
