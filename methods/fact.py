"""FacT, Factor-Tuning: the weight increments of a transformer as one tensor in factors, shared by all blocks.

This file declares and attaches; the modules are in `methods/modules/fact.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from harness import method
from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.backbone import StagedBackbone
    from methods.modules.fact import Increment

ROLES = ("qkv", "q", "k", "v", "kv", "proj", "fc1", "gate", "fc2", "joint_in", "joint_out")


@dataclass(frozen=True)
class _Target:
    """A layer whose weight [outputs·width, inputs·width] is cut into squares."""

    layer: str
    width: int
    inputs: int
    outputs: int

    @property
    def slices(self) -> int:
        return self.inputs * self.outputs


class FacT(Method):
    """The projections of attention and MLP, cut into C×C slices (12 per ViT block), are stacked into one tensor; its
    increment is s·U Σ_l V for slice l, with U and V shared by all blocks.

    `tt` (tensor train): Σ_l is free. `tk` (Tucker): Σ_l = Σ_k P_kl·core_k. V starts at zero, the other factors, the
    place of dropout and its rate as in the released code. The code of the Tucker form mixes the order of slices in
    the MLP when it reshapes the core; here a slice is a slice, as in the paper (same number of parameters).
    Where the width differs by stage (Swin, PVT), each width has its own U, V and core. The scale s and the rank
    (up to 16 for tt, 32 for tk) are chosen per task in the paper.
    """

    name = "fact"
    summary = "weight increments of all blocks from shared low-rank factors"
    source = "Jie & Deng, FacT, arXiv 2212.03145; code github.com/JieShibo/PETL-ViT (FacT)"
    decayed = ("u", "v", "core", "rows", "middle")
    mergeable: ClassVar[bool] = True

    class Hyperparameters(method.Hyperparameters):
        form: Literal["tt", "tk"] = hyperparameter("tt", "tensor train or Tucker", search=["tt", "tk"])
        rank: int = hyperparameter(16, "r, the inner width of the factors", ge=1, le=256, search=[4, 8, 16, 32])
        scale: float = hyperparameter(1.0, "s, the factor on the increment", gt=0, le=1000,
                            search=[0.01, 0.1, 1.0, 10.0, 100.0])  # fmt: skip
        dropout: float = hyperparameter(0.1, "dropout between the middle factor and V", ge=0, lt=1)

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        found = _targets(backbone)
        return True if isinstance(found, list) else found

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.fact import Increment, SharedFactors

        options, tucker = self.hyperparameters, self.hyperparameters.form == "tk"
        self._added: list[tuple[str, Increment]] = []
        for width, targets in _by_width(backbone).items():
            shared = SharedFactors(width, options.rank, sum(target.slices for target in targets), tucker)
            first = 0
            for target in targets:
                module = Increment(
                    shared,
                    owner=target is targets[0],
                    inputs=target.inputs,
                    outputs=target.outputs,
                    first=first,
                    tucker=tucker,
                    scale=options.scale,
                    dropout=options.dropout,
                )
                backbone.add_to_layer(target.layer, module)
                self._added.append((target.layer, module))
                first += target.slices

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        """2Cr for each width C; then r² for each slice (tt), or the core r³ and r for each slice (tk)."""
        rank, tucker = self.hyperparameters.rank, self.hyperparameters.form == "tk"
        total = 0
        for width, targets in _by_width(backbone).items():
            slices = sum(target.slices for target in targets)
            total += 2 * width * rank + (rank**3 + rank * slices if tucker else rank**2 * slices)
        return total

    def merge(self, backbone: StagedBackbone) -> None:
        """Add the increments to the weights."""
        for layer, module in self._added:
            module.fold_into(backbone.get_submodule(layer))
        for _, module in self._added:
            backbone.remove(module)
        self._added = []


def _targets(backbone: StagedBackbone) -> list[_Target] | Unsupported:
    """The layers, or why there are none."""
    from torch import nn

    kinds = {branch.kind for branch in backbone.branches}
    if not kinds or "conv" in kinds:
        return Unsupported("its blocks are convolutional, and FacT stacks the projections of attention and MLP")
    width_of = {id(inner): block.channels for block in backbone.blocks for inner in block.module.modules()}
    targets = []
    for name in backbone.layers(*ROLES):
        layer = backbone.get_submodule(name)
        width = width_of.get(id(layer))
        if width is None or not isinstance(layer, nn.Linear):
            return Unsupported(f"{name} is not a linear layer of a block")
        if layer.in_features % width or layer.out_features % width:
            return Unsupported(
                f"the weight of {name}, {layer.out_features}×{layer.in_features}, is not made of squares of {width}"
            )
        targets.append(_Target(name, width, layer.in_features // width, layer.out_features // width))
    return targets


def _by_width(backbone: StagedBackbone) -> dict[int, list[_Target]]:
    targets = _targets(backbone)
    assert isinstance(targets, list)  # only called after `supports`
    groups: dict[int, list[_Target]] = {}
    for target in targets:
        groups.setdefault(target.width, []).append(target)
    return groups
