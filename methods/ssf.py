"""SSF, Scaling and Shifting your Features: a scale and a shift of each channel after every layer.

This file declares and attaches; the module is in `methods/modules/ssf.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from harness.method import Method

if TYPE_CHECKING:
    from torch import nn

    from harness.models.backbones.backbone import StagedBackbone


@dataclass(frozen=True)
class _Place:
    layer: str
    """Whose output is scaled and shifted."""
    inserted_after: str
    """The layer, or the part of it that comes before a fused activation."""
    channels: int
    dim: int
    """Of the channels in the layer's output."""
    shift: bool


class SSF(Method):
    """After every linear layer, convolution and norm: y = scale·x + shift, for each channel.

    As in the paper, after every operation; the released code leaves one out, the linear layer that merges patches in
    Swin. The released code draws scales around 1 and shifts around 0 with deviation 0.02; here they start at 1 and 0,
    so that the start is the frozen network. Where a norm and its activation are one module (timm's `BatchNormAct2d`),
    ours is between the two. A norm without a bias by construction (RMS norm) only gets a scale, so that all of it can
    be merged. ConvNeXt V2's response normalisation, a residual unit, is not such a layer.
    """

    name = "ssf"
    summary = "a scale and a shift of each channel after every layer"
    source = "Lian et al., Scaling & Shifting Your Features, arXiv 2210.08823; code github.com/dongzelian/SSF"
    mergeable: ClassVar[bool] = True

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.ssf import ScaleShift

        self._added: list[tuple[str, nn.Module]] = []
        for place in _places(backbone):
            module = ScaleShift(place.channels, place.dim, place.shift)
            backbone.insert_after(place.inserted_after, module)
            self._added.append((place.layer, module))

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        return sum(place.channels * (2 if place.shift else 1) for place in _places(backbone))

    def merge(self, backbone: StagedBackbone) -> None:
        """Fold scales and shifts into weights and biases. A layer without a bias gets one."""
        for layer, module in self._added:
            module.fold_into(backbone.get_submodule(layer))
            backbone.remove(module)
        self._added = []


def _places(backbone: StagedBackbone) -> list[_Place]:
    from torch import nn

    places = []
    for name in backbone.layers():
        layer = backbone.get_submodule(name)
        linear = isinstance(layer, nn.Linear)
        channels = layer.out_features if linear else layer.out_channels
        places.append(_Place(name, name, channels, -1 if linear else 1, True))
    for name, norm in backbone.norms().items():
        kind = type(norm).__name__
        if "Response" in kind or norm.weight is None:
            continue
        first = isinstance(norm, nn.BatchNorm2d | nn.GroupNorm) or "2d" in kind
        fused = hasattr(norm, "act") and hasattr(norm, "drop")
        centred = not kind.lower().startswith(("rms", "simple"))
        inserted_after = f"{name}.drop" if fused else name
        places.append(_Place(name, inserted_after, norm.weight.numel(), 1 if first else -1, centred))
    return places
