"""The adapted network: a frozen backbone with a method attached, and a head; its trained tensors and their count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.data.base import IGNORE_INDEX
from harness.method import Method
from harness.models.backbones.backbone import StagedBackbone, StageOutputs, pad_to
from harness.models.heads import build_auxiliary_head, build_head
from harness.models.losses import cross_entropy, upsample
from harness.spec import Budget
from harness.util.seeds import derive


class MethodError(Exception):
    """A method violates its contract: a bug in the method, not a user error."""


class UnsupportedMethod(Exception):
    """The method does not support the backbone; the message says why."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of scalars. `trainable` = `method` + `head`; `auxiliary`: a head that exists in training only; `backbone`
    is the pre-trained network, frozen or not."""

    method: int
    head: int
    trainable: int
    auxiliary: int
    backbone: int


class Segmenter(nn.Module):
    """images -> class logits; with masks, the training loss as well."""

    def __init__(
        self,
        backbone: StagedBackbone,
        head: nn.Module,
        method: Method,
        auxiliary: nn.Module | None = None,
        auxiliary_weight: float = 0.0,
    ):
        """`auxiliary`: a head whose loss is added in training with this weight, and that nothing else uses."""
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.method = method
        self.auxiliary = auxiliary
        self.auxiliary_weight = auxiliary_weight

    def forward(self, images: Tensor | StageOutputs, masks: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """images [B, 3, H, W], or their `backbone.prefix` -> logits [B, classes, h, w] at the head's size, which cover
        the backbone's canvas.

        With masks [B, H, W]: (loss, logits), the loss being the mean cross-entropy over labelled pixels at the
        masks' size plus the losses of the auxiliary head and of the method, in float32; the logits are detached.
        """
        maps = self.backbone(images)
        logits = self.head(maps)
        if masks is None:
            return logits
        size = masks.shape[-2], masks.shape[-1]
        loss = cross_entropy(self.image_logits(logits, size), masks)
        if self.auxiliary is not None:
            loss = loss + self.auxiliary_weight * cross_entropy(self.image_logits(self.auxiliary(maps), size), masks)
        of_method = self.method.auxiliary_loss(self.canvas_labels(masks))
        return (loss if of_method is None else loss + of_method), logits.detach()

    def image_logits(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits [B, K, h, w] of images of `size` (H, W) -> float32 [B, K, H, W]: upsampled to the canvas, cropped."""
        return upsample(logits, self.backbone.canvas(size))[..., : size[0], : size[1]]

    def canvas_labels(self, masks: Tensor) -> Tensor:
        """Labels [B, H, W] -> [B, H', W'] on the canvas, ignored outside the image: to sample at a map's size."""
        return pad_to(masks, self.backbone.canvas((masks.shape[-2], masks.shape[-1])), IGNORE_INDEX)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the heads and of the classifiers that the method adds: they learn at `head_lr`."""
        yield from self.head.parameters()
        if self.auxiliary is not None:
            yield from self.auxiliary.parameters()
        yield from self.method.head_parameters()

    def delta_state(self) -> dict[str, Tensor]:
        """The part of `trained_state` that a prediction needs: without the auxiliary head."""
        return {name: tensor for name, tensor in self.trained_state().items() if not name.startswith("auxiliary.")}

    def trained_state(self) -> dict[str, Tensor]:
        """Every tensor that training changes: trained parameters and the buffers of modules that are not frozen."""
        state = {name: parameter.detach() for name, parameter in self.trained_parameters()}
        for prefix, module in self.named_modules():
            if self.backbone.is_frozen(module):
                continue
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    state[name] = buffer
        return state

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trained_state`. Raises `ValueError` that names the tensors that do not fit."""
        own = self.trained_state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors do not fit, the first is {wrong[0]}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def count_parameters(self) -> ParameterCounts:
        trained = dict(self.trained_parameters())
        head, auxiliary = (
            sum(parameter.numel() for name, parameter in trained.items() if name.startswith(f"{part}."))
            for part in ("head", "auxiliary")
        )
        method = sum(parameter.numel() for parameter in trained.values()) - head - auxiliary
        return ParameterCounts(method, head, method + head, auxiliary, self.backbone.pretrained_parameters)


def apply_memory_format(module: nn.Module, budget: Budget) -> nn.Module:
    """Set the budget's memory layout for a network's convolutions, in place; their inputs follow.

    A module with a true attribute `keeps_layout`, whose code relies on torch's default layout, is not changed.
    """
    if not budget.channels_last:
        return module
    module.to(memory_format=torch.channels_last)
    for part in module.modules():
        if getattr(part, "keeps_layout", False):
            part.to(memory_format=torch.contiguous_format)
        if isinstance(part, nn.GroupNorm) and any(parameter.requires_grad for parameter in part.parameters()):
            part.register_forward_pre_hook(_contiguous_where_no_gradient_goes)
    return module


def _contiguous_where_no_gradient_goes(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """On a CPU torch (2.12) crashes in a group norm's backward pass where a channels-last input takes no gradient."""
    (feature_map,) = inputs
    return (feature_map if feature_map.requires_grad else feature_map.contiguous(),)


def build_segmenter(
    backbone: StagedBackbone, method: Method, head: str, num_classes: int, seed: int, auxiliary_head: float = 0.0
) -> Segmenter:
    """Attach the method to the backbone and put the head on top; for training, also the budget's `auxiliary_head`.

    Raises `UnsupportedMethod` if the method does not support the backbone, `MethodError` if it does not train as many
    parameters as its closed form says, and `UserError` if the head does not fit the backbone.
    """
    supported = method.supports(backbone)
    if not supported:
        raise UnsupportedMethod(f"{method.name} on {backbone.name}: {supported}")
    module = build_head(head, backbone, num_classes, derive(seed, "head"))
    auxiliary = None
    if auxiliary_head:
        auxiliary = build_auxiliary_head(backbone, num_classes, derive(seed, "auxiliary head"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "method"))
        expected = method.parameter_count(backbone, num_classes)
        method.attach(backbone, num_classes)
    segmenter = Segmenter(backbone, module, method, auxiliary, auxiliary_head)
    counted = segmenter.count_parameters().method
    if counted != expected:
        raise MethodError(
            f"{method.name} on {backbone.name}: trains {counted} parameters, but its closed form gives {expected}"
        )
    return segmenter
