"""The hooks at the attach points: they call a method's module and record what is needed during one forward pass.

`attach.py` places the hooks; this module does not depend on a family. Hooks are objects that are deep-copied with the
network, so that a copy's hooks refer to its own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from harness.models.backbones.family import Layout

View = Literal["tokens", "map"]
"""The input and output of an added module. `tokens`: channels last, [B, ..., C], with prefix tokens. `map`:
[B, C, h, w], without prefix tokens: a sequential module passes them unchanged, a parallel one adds nothing to them."""


class Geometry(Protocol):
    """The backbone's interface for hooks: the layout of activations in the current forward pass."""

    def count_prefix_tokens(self, x: Tensor) -> int: ...

    def stage_map(self, x: Tensor, stage: int) -> Tensor: ...


@dataclass(frozen=True)
class Shape:
    """How to read a tensor at one place."""

    layout: Layout
    stage: int


@dataclass
class ForwardState:
    """State of one forward pass; not copied with the network."""

    size: tuple[int, int] | None = None
    """(H', W') of the canvas."""
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Inputs of branches and layers that have not reached their end, by the hook that takes them there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardState, ()


def shaped_like(feature_map: Tensor, x: Tensor, prefix: Tensor | None) -> Tensor:
    """A map [B, C, h, w] in the channels-last shape of `x`, after its `prefix` tokens if it is a sequence."""
    if x.dim() == 4:
        return feature_map.permute(0, 2, 3, 1)
    patches = feature_map.flatten(2).transpose(1, 2)
    return torch.cat([prefix.to(patches.dtype), patches], dim=1) if prefix is not None else patches


def _channels_last(x: Tensor, layout: Layout) -> Tensor:
    return x.permute(0, 2, 3, 1) if layout == "NCHW" else x


def _native(x: Tensor, layout: Layout) -> Tensor:
    return x.permute(0, 3, 1, 2) if layout == "NCHW" else x


def _apply(module: nn.Module, view: View, x: Tensor, stage: int, geometry: Geometry, parallel: bool) -> Tensor:
    """`module` on the channels-last `x` in its view. `parallel`: the result is added, so prefix tokens get zero."""
    if view == "tokens":
        return module(x)
    count = geometry.count_prefix_tokens(x)
    prefix = x[:, :count] if count else None
    if parallel and prefix is not None:
        prefix = torch.zeros_like(prefix)
    return shaped_like(module(geometry.stage_map(x, stage)), x, prefix)


@dataclass(eq=False)
class AfterPlace:
    """Forward hook of a branch's entry or exit, or of a block: its output passes through the module."""

    module: nn.Module
    view: View
    shape: Shape
    geometry: Geometry

    def __call__(self, target: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        x = _channels_last(output, self.shape.layout)
        y = _apply(self.module, self.view, x, self.shape.stage, self.geometry, parallel=False)
        return _native(y, self.shape.layout)


class BranchInput:
    """Holds a branch's input until its exit. Both are within one call of a block, checkpointed or not."""

    def __init__(self, state: ForwardState, shape: Shape):
        self.state = state
        self.shape = shape

    def before(self, target: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.state.inputs[id(self)] = inputs[0]

    def after(self, target: nn.Module, inputs: Any, output: Tensor) -> None:
        self.state.inputs[id(self)] = output

    def take(self) -> Tensor:
        return _channels_last(self.state.inputs.pop(id(self)), self.shape.layout)


@dataclass(eq=False)
class ParallelBranch:
    """Forward hook of a branch's exit: adds the module's output for the stored input."""

    module: nn.Module
    view: View
    branch_input: BranchInput
    shape: Shape
    geometry: Geometry

    def __call__(self, target: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        y = _apply(self.module, self.view, self.branch_input.take(), self.shape.stage, self.geometry, parallel=True)
        return output + _native(y, self.shape.layout)


@dataclass(eq=False)
class AfterLayer:
    """Forward hook: y = module(layer(x)), in the layer's own layout."""

    module: nn.Module

    def __call__(self, target: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self.module(output)


@dataclass(eq=False)
class ParallelLayers:
    """y = last(... first(x)) + module(x), in the layers' own layout: `before` the first, `after` the last."""

    module: nn.Module
    state: ForwardState

    def before(self, first: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.state.inputs[id(self)] = inputs[0]

    def after(self, last: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + self.module(self.state.inputs.pop(id(self)))


@dataclass(eq=False)
class BeforeLayer:
    """Forward pre-hook: y = layer(module(x)), where the module sees channels last."""

    module: nn.Module

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = inputs
        layout: Layout = "NCHW" if isinstance(layer, nn.Conv2d) else "NLC"
        return (_native(self.module(_channels_last(x, layout)), layout), *rest)


@dataclass(eq=False)
class InsertPrompts:
    """Forward pre-hook of a block: prompt tokens from `start` on, in place of `replaced` tokens there."""

    prompts: nn.Module
    block: int
    start: int
    replaced: int

    def __call__(self, target: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = inputs
        prompt = self.prompts(self.block).expand(x.shape[0], -1, -1).to(x.dtype)
        return (torch.cat([x[:, : self.start], prompt, x[:, self.start + self.replaced :]], dim=1), *rest)


class Residual(nn.Module):
    """x -> x + change(x)."""

    def __init__(self, change: nn.Module):
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


class StreamChange(nn.Module):
    """A branch's output f -> f + change(x + f), where `NoteInput` stored the branch's input x."""

    def __init__(self, change: nn.Module):
        super().__init__()
        self.change = change
        self.noted: list[Tensor] = []

    def forward(self, output: Tensor) -> Tensor:
        return output + self.change(self.noted.pop() + output)


class NoteInput(nn.Module):
    """Parallel to a branch: stores the branch's input for a `StreamChange`, and adds zero."""

    def __init__(self, stream: StreamChange):
        super().__init__()
        self.noted = stream.noted

    def forward(self, x: Tensor) -> Tensor:
        self.noted[:] = [x]
        return x.new_zeros([1] * x.dim())


@dataclass(eq=False)
class PatchGrid:
    """Runs convolutions on the patches of one place's channels-last tokens, of any number of channels.

    Each prefix token is convolved as a map of one pixel, like the class token in Convpass's code. Not a module, so that
    a module that holds one does not register the backbone as its child.
    """

    geometry: Geometry
    stage: int

    def __call__(self, convolve: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """`convolve` takes and returns [., C, h, w]; tokens [B, h, w, C] or [B, prefix + h·w, C] keep their shape."""
        convolved = convolve(self.geometry.stage_map(tokens, self.stage))
        count = self.geometry.count_prefix_tokens(tokens)
        if not count:
            return shaped_like(convolved, tokens, tokens[:, :0] if tokens.dim() == 3 else None)
        prefix = tokens[:, :count]
        pixels = convolve(prefix.reshape(-1, prefix.shape[2], 1, 1)).reshape(prefix.shape)
        return shaped_like(convolved, tokens, pixels)
