"""Frozen convolutions and batch norms that save no more than needed for the backward pass.

The gradient of their input only depends on their own tensors, but torch also saves the input, for a weight gradient
that is not needed: half of what a frozen CNN saves. Each call checks whether its parameters are frozen and its input
requires a gradient; otherwise the class's own forward runs unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

LEAN_FROM = 2**20
"""Inputs of at least this many bytes are not saved; for smaller ones a Python call costs more than it saves."""


def make_lean(network: nn.Module) -> None:
    """Make every convolution and batch norm in `network` save as little as possible, whether frozen now or later.

    Outputs and gradients are the same to the bit: forward and backward pass call the same kernels. Modules, their
    names, parameters and buffers stay the same objects. A `Conv2d` keeps its class, because methods look for exactly
    that class: its inner step is replaced. A module of exactly one of the classes in `LEAN` gets a subclass.
    Other classes (weight standardisation, a plugin's own) are not changed.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module._conv_forward = partial(_conv_forward, module)
        elif (lean := LEAN.get(type(module))) is not None:
            module.__class__ = lean


def _conv_forward(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    if plain and _is_lean(x, weight, bias):
        return _convolve(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return nn.Conv2d._conv_forward(conv, x, weight, bias)


class LeanConv2dSame(Conv2dSame):
    def forward(self, x: Tensor) -> Tensor:
        if not _is_lean(x, self.weight, self.bias):
            return super().forward(x)
        x = pad_same(x, self.weight.shape[-2:], self.stride, self.dilation)
        return _convolve(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class LeanBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return _normalise(self, x) if _is_lean_norm(self, x) else super().forward(x)


class LeanBatchNormAct2d(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(_normalise(self, x))) if _is_lean_norm(self, x) else super().forward(x)


LEAN: dict[type[nn.Module], type[nn.Module]] = {
    lean.__base__: lean for lean in (LeanConv2dSame, LeanBatchNorm2d, LeanBatchNormAct2d)
}


def _is_lean(x: Tensor, *own: Tensor | None) -> bool:
    """Whether a gradient goes through the module to a large x [B, C, H, W] and to none of its own tensors.

    Compilers and tracers see the plain operations: they decide for themselves what is saved.
    """
    return (
        x.requires_grad
        and x.dim() == 4
        and x.nbytes >= LEAN_FROM
        and torch.is_grad_enabled()
        and not any(tensor is not None and tensor.requires_grad for tensor in own)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _is_lean_norm(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    evaluating = not norm.training and norm.running_mean is not None and norm.running_var is not None
    return evaluating and _is_lean(x, norm.weight, norm.bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """As `F.conv2d`. Autocast's conversion of x happens here, inside autograd; the other tensors need no gradient."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return _Convolution.apply(x, weight, bias, *options)


def _normalise(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return _EvaluatedNorm.apply(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


class _Convolution(Function):
    """conv2d of x with a frozen weight; only the weight is saved for the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.layout = _Layout(x)
        ctx.options = (stride, padding, dilation, False, (0, 0), groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        x = ctx.layout.blank()
        of_input, _, _ = torch.ops.aten.convolution_backward.default(
            gradient, x, weight.to(x.dtype), None, *ctx.options, (True, False, False)
        )
        return of_input, *(None,) * 6


class _EvaluatedNorm(Function):
    """Batch norm of x [B, C, H, W] with frozen statistics, weight and bias: one factor and one offset a channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(mean, variance, weight)
        ctx.layout = _Layout(x)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mean, variance, weight = ctx.saved_tensors
        x = gradient.detach() if _Layout(gradient) == ctx.layout else ctx.layout.blank()
        saved = mean.new_empty(0)  # what the forward kernel saves in evaluation mode; on a GPU it must not be None
        of_input, _, _ = torch.ops.aten.native_batch_norm_backward.default(
            gradient, x, weight, mean, variance, saved, saved, False, ctx.eps, (True, False, False)
        )
        return of_input, *(None,) * 5


class _Layout:
    """The properties of an input that a backward kernel reads when only the input's gradient is needed."""

    def __init__(self, tensor: Tensor):
        self.fields = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Layout) and self.fields == other.fields

    __hash__ = None  # type: ignore[assignment]  # compared by value and mutable inside

    def blank(self) -> Tensor:
        """An uninitialised tensor of that layout.

        Not by `torch.empty_strided`, which fills the memory if deterministic algorithms are enabled.
        """
        shape, stride, dtype, device = self.fields
        if device.type == "meta":
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)
        length = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if all(shape) else 0
        storage = torch.UntypedStorage(length * dtype.itemsize, device=device)
        return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, stride)
