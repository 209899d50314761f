"""Layers of HF peft inside a frozen backbone: which layers, how peft is called, and how its layers are merged.

peft wraps whole layers. A projection that holds queries, keys and values in one matrix is therefore first split into
views of its parts, so that a method can adapt those that its paper names; the matrix itself stays one frozen tensor.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from harness.models.backbones.backbone import StagedBackbone

FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v")}


@dataclass(frozen=True)
class Target:
    """A Linear or Conv2d layer, or one part of a fused projection, to adapt."""

    layer: str
    """The layer's name in the backbone."""
    part: str
    """`q`, `k` or `v` of a fused projection; empty: the whole layer."""
    role: str
    inputs: int
    outputs: int
    kernel: int = 1
    """Cells of the convolution's kernel; 1 for a Linear."""
    start: int = 0
    """The first row of a part in the fused projection."""

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.part}" if self.part else self.layer


def find_targets(backbone: StagedBackbone, roles: frozenset[str]) -> list[Target]:
    """The layers of these roles that peft computes correctly: plain Linear, and plain square Conv2d of one group.

    Layers that only look like them (dynamic padding, standardised weights) and dilated ones are not adapted.
    """
    found = []
    for name, role in backbone.roles().items():
        module = backbone.get_submodule(name)
        if type(module) is nn.Linear:
            parts = FUSED.get(role, ())
            if parts:
                rows = module.out_features // len(parts)
                found += [
                    Target(name, part, part, module.in_features, rows, start=index * rows)
                    for index, part in enumerate(parts)
                    if part in roles
                ]
            elif role in roles:
                found.append(Target(name, "", role, module.in_features, module.out_features))
        elif type(module) is nn.Conv2d and role in roles and _is_plain(module):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            found.append(Target(name, "", role, module.in_channels, module.out_channels, kernel))
    return found


def _is_plain(conv: nn.Conv2d) -> bool:
    pairs = (conv.kernel_size, conv.stride, conv.padding)
    return (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and all(not isinstance(pair, str) and pair[0] == pair[1] for pair in pairs)
    )


def weight_of(backbone: StagedBackbone, target: Target) -> Tensor:
    """The frozen weight [outputs, inputs, ...] of the target, as a view."""
    layer: Any = backbone.get_submodule(target.layer)
    return layer.weight[target.start : target.start + target.outputs]


class Rows(nn.Linear):
    """Consecutive rows of another Linear as a layer of their own; holds no tensor itself."""

    def __init__(self, source: nn.Linear, start: int, rows: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, rows
        self._source = (source,)  # in a tuple, which keeps it from being registered twice
        self._rows = slice(start, start + rows)

    @property
    def weight(self) -> Tensor:  # a view of the source's rows, not a parameter
        return self._source[0].weight[self._rows]

    @property
    def bias(self) -> Tensor | None:  # a view as well
        bias = self._source[0].bias
        return None if bias is None else bias[self._rows]

    def copied(self) -> nn.Linear:
        """A layer with tensors of its own."""
        weight, bias = self.weight, self.bias
        layer = nn.Linear(self.in_features, self.out_features, bias is not None, weight.device, weight.dtype)
        layer.requires_grad_(False)
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    def overwrite(self, layer: nn.Linear) -> None:
        with torch.no_grad():
            self.weight.copy_(layer.weight)
            if self.bias is not None:
                self.bias.copy_(layer.bias)


class SplitProjection(nn.Module):
    """A fused projection computed part by part: [..., inputs] -> [..., parts · outputs]."""

    def __init__(self, fused: nn.Linear, parts: tuple[str, ...]):
        super().__init__()
        self.fused = fused
        self.parts = parts
        rows = fused.out_features // len(parts)
        for index, part in enumerate(parts):
            self.add_module(part, Rows(fused, index * rows, rows))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, part)(x) for part in self.parts], dim=-1)


class _AsSequence:
    """Hooks that reshape [B, ..., C] to [B, N, C], for layers that take four dimensions for a convolution's input."""

    shape: torch.Size = torch.Size()

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        self.shape = x.shape
        return (x.flatten(1, -2) if x.dim() > 3 else x, *rest)

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.reshape(*self.shape[:-1], output.shape[-1])


def see_sequences(backbone: StagedBackbone, targets: list[Target]) -> None:
    """Reshape the inputs of the wrapped Linear layers among the targets to [B, N, C]."""
    for target in targets:
        layer: Any = backbone.get_submodule(target.name)
        if isinstance(layer.base_layer, nn.Linear):
            hooks = _AsSequence()
            layer.register_forward_pre_hook(hooks.before)
            layer.register_forward_hook(hooks.after)


def inject(backbone: StagedBackbone, targets: list[Target], config: Any) -> None:
    """Let peft wrap the targets according to `config`. Frozen parameters stay frozen.

    Draws from torch's global generator. Raises `RuntimeError` where peft did not wrap exactly the targets.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    roles = backbone.roles()
    for layer in dict.fromkeys(target.layer for target in targets if target.part):
        fused: Any = backbone.get_submodule(layer)
        _replace(backbone, layer, SplitProjection(fused, FUSED[roles[layer]]))
    names = {target.name for target in targets}
    config.target_modules = set(names)
    trained = {id(parameter) for parameter in backbone.parameters() if parameter.requires_grad}
    own = list(backbone.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, backbone)
    del backbone.peft_config
    for parameter in own:
        parameter.requires_grad_(id(parameter) in trained)
    wrapped = {name for name, module in backbone.named_modules() if isinstance(module, BaseTunerLayer)}
    if wrapped != names:
        raise RuntimeError(f"peft wrapped other layers than configured; the first that differs: {min(wrapped ^ names)}")


def fold(backbone: StagedBackbone) -> None:
    """Fold every layer of peft into the frozen weights and put the backbone's own layers back in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.no_grad():
        modules: list[tuple[str, Any]] = list(backbone.named_modules())
        for name, module in modules:
            if not isinstance(module, BaseTunerLayer):
                continue
            base = module.base_layer
            if isinstance(base, Rows):
                module.base_layer = base.copied()
                module.merge(safe_merge=True)
                base.overwrite(module.base_layer)
            else:
                module.merge(safe_merge=True)
            _replace(backbone, name, base)
        for name, module in list(backbone.named_modules()):
            if isinstance(module, SplitProjection):
                _replace(backbone, name, module.fused)


def _replace(backbone: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, module)


def largest_divisor(number: int, at_most: int) -> int:
    return next(d for d in range(min(at_most, number), 0, -1) if number % d == 0)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`; of two equally near ones, the smaller."""
    if wanted >= number:
        return number
    below = largest_divisor(number, wanted)
    above = next(d for d in range(wanted, number + 1) if number % d == 0)
    return below if wanted - below <= above - wanted else above
