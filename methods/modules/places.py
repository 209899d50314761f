"""Adapters beyond what `AttachPoints` names: on the residual stream, before layers, on the grid of patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.models.backbones.attach import Block, Branch
from harness.models.backbones.backbone import StagedBackbone


@dataclass(eq=False)
class Grid:
    """Runs convolutions on the patches of one place's channels-last tokens, of any number of channels.

    A prefix token is a map of one pixel to the convolutions, as the class token is in Convpass's code. Not a module,
    so that a module which holds one does not register the backbone as its own.
    """

    backbone: StagedBackbone
    place: Branch | Block

    def __call__(self, convolve: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """`convolve` takes and returns [., C, h, w]; tokens [B, h, w, C] or [B, prefix + h·w, C] keep their shape."""
        convolved = convolve(self.backbone.as_map(tokens, self.place))
        count = self.backbone.prefix_tokens if tokens.dim() == 3 else 0
        if not count:
            return self.backbone.from_map(convolved, tokens)
        prefix = tokens[:, :count]
        pixels = convolve(prefix.reshape(-1, prefix.shape[2], 1, 1))
        return self.backbone.from_map(convolved, pixels.reshape(prefix.shape))


def add_to_stream(backbone: StagedBackbone, branch: Branch, change: nn.Module) -> None:
    """Behind the branch's residual addition, x = x + f: the stream becomes x + change(x).

    `change` sees channels-last tokens. Equal to y = x + (f + change(x + f)), which is what is computed.
    """
    stream = _Stream(change)
    backbone.add_parallel(branch, _Note(stream))
    backbone.add_at_exit(branch, stream)


class _Stream(nn.Module):
    """f -> f + change(x + f), where the branch's input x was noted just before."""

    def __init__(self, change: nn.Module):
        super().__init__()
        self.change = change
        self.noted: list[Tensor] = []

    def forward(self, output: Tensor) -> Tensor:
        return output + self.change(self.noted.pop() + output)


class _Note(nn.Module):
    """Notes the branch's input for the stream, and adds zero."""

    def __init__(self, stream: _Stream):
        super().__init__()
        self.note = stream.noted

    def forward(self, x: Tensor) -> Tensor:
        self.note[:] = [x]
        return x.new_zeros([1] * x.dim())


class Residual(nn.Module):
    """x -> x + change(x)."""

    def __init__(self, change: nn.Module):
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


def add_before(backbone: StagedBackbone, layers: Sequence[str], module: nn.Module) -> None:
    """Sequential, in front of one or more of the backbone's Linear and Conv2d layers: y = layer(module(x)).

    `module` sees channels last. Layers that share their input share the module.
    """
    backbone.added[f"{layers[0].replace('.', '_')}_before"] = module
    for name in layers:
        backbone.get_submodule(name).register_forward_pre_hook(Before(module))


@dataclass(eq=False)
class Before:
    """The hook of `add_before`."""

    module: nn.Module

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = inputs
        if isinstance(layer, nn.Conv2d):
            return (self.module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), *rest)
        return (self.module(x), *rest)


def fold_before(backbone: StagedBackbone, affine: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> None:
    """Undo every `add_before` by folding its module, x -> M x + c = `affine(module)`, into the layers behind it.

    A layer without a bias gets one where c is not zero. Exact for convolutions without padding alone.
    """
    folded = set()
    with torch.no_grad():
        for layer in backbone.modules():
            for key, hook in list(layer._forward_pre_hooks.items()):
                if not isinstance(hook, Before):
                    continue
                _fold(layer, *affine(hook.module))
                del layer._forward_pre_hooks[key]
                folded.add(hook.module)
    for key, module in list(backbone.added.items()):
        if module in folded:
            del backbone.added[key]


def _fold(layer: nn.Module, matrix: Tensor, constant: Tensor) -> None:
    weight = layer.weight.to(torch.float64)
    shift = torch.einsum("oi...,i->o...", weight, constant).flatten(1).sum(1) if weight.dim() > 2 else weight @ constant
    layer.weight.copy_(torch.einsum("oc...,ci->oi...", weight, matrix))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias + shift)
    elif bool(shift.any()):
        layer.bias = nn.Parameter(shift.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
