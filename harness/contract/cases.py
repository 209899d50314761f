"""The fixtures of the checks: a method on a tiny network with random weights, and a short training of it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from harness.method import Method
from harness.models.backbones import families
from harness.models.backbones.backbone import StagedBackbone
from harness.models.network import Segmenter, build_segmenter

TINY = {family: tiny.name for family, tiny in families.tiny_networks().items()}
"""family -> a small network of it; its weights are drawn at random."""

SMALLER = {tiny.name: tiny.changes for tiny in families.tiny_networks().values()}
"""tiny network -> further arguments for timm, where the smallest network of the family is not small enough."""

CLASSES = 5
SIDE = 64
STEPS = 3


class ContractBroken(Exception):
    """A method violates the contract; the message says how."""


@lru_cache(maxsize=2)
def _frozen_backbone(name: str) -> StagedBackbone:
    """Cached, since a copy takes a tenth of the time of building it. The caller must not change it.

    Parameters that timm initialises to (almost) zero are drawn at random: in a pre-trained network no branch outputs
    zero, and no gradient would reach a module inside such a branch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = families.cut(name, families.create(name, **SMALLER.get(name, {})))
        for parameter in backbone.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.copy_(torch.rand(parameter.shape) / 10)
    return backbone


@dataclass
class Case:
    """A method with its default hyperparameters on one backbone."""

    method: type[Method]
    backbone: str
    device: str = "cpu"

    def frozen_backbone(self) -> StagedBackbone:
        """The frozen backbone with random weights from a fixed seed, with the arguments in `SMALLER`."""
        return copy.deepcopy(_frozen_backbone(self.backbone)).to(self.device)

    def build(self, backbone: StagedBackbone | None = None, classes: int = CLASSES) -> Segmenter:
        method = self.method(self.method.Hyperparameters())
        backbone = self.frozen_backbone() if backbone is None else backbone
        return build_segmenter(backbone, method, "fpn:16", classes, seed=0).to(self.device)

    @cached_property
    def short_training(self) -> ShortTraining:
        """Two equal networks; the first has been trained for a few steps."""
        return ShortTraining.of(self)

    @cached_property
    def plain_gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss and the gradients of the trained network in deterministic mode, that others are compared with."""
        return gradients_of(deterministic_mode(self.short_training.network))


@dataclass
class ShortTraining:
    """Everything that a short training changed."""

    network: Segmenter
    """Trained for `STEPS`."""
    twin: Segmenter
    """An identical network, built before `network` was trained and never trained itself."""
    twin_before: dict[str, Tensor]
    disturbed: list[str]
    """Tensors of `network` that building `twin` changed."""
    changed: list[str]
    """Frozen tensors that attaching or training changed."""
    silent: list[str]
    """Trained parameters that never received a gradient."""
    copied: list[str]
    """Tensors of the delta that are copies of pre-trained ones."""
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, case: Case) -> ShortTraining:
        backbone = case.frozen_backbone()
        pretrained = {name: (tensor, tensor.detach().clone()) for name, tensor in _tensors(backbone)}
        network = case.build(backbone)
        attached = snapshot(network)
        twin = case.build()
        disturbed = differing(attached, network.state_dict())
        twin_before = snapshot(twin)
        silent = {name for name, _ in network.trained_parameters()}
        losses = train_briefly(network, on_backward=lambda: silent.difference_update(_with_gradient(network)))

        moving = _moving(network)
        changed = [
            name for name, (tensor, old) in pretrained.items() if id(tensor) not in moving and _differ(tensor, old)
        ]
        trained = network.trained_state()
        frozen = {name: tensor for name, tensor in attached.items() if name not in trained}
        changed += [name for name in differing(frozen, network.state_dict()) if name not in changed]
        parameters = dict(network.trained_parameters())
        copied = [
            name
            for name, tensor in trained.items()
            if name not in parameters and any(_is_copy(tensor, old) for _, old in pretrained.values())
        ]
        return cls(network, twin, twin_before, disturbed, changed, sorted(silent), copied, losses)


def train_briefly(network: Segmenter, on_backward: Callable[[], object] = lambda: None) -> list[float]:
    images, masks = four_images(device_of(network))
    optimizer = torch.optim.AdamW([parameter for _, parameter in network.trained_parameters()], lr=1e-3, fused=True)
    network.train()
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        loss, _ = network(images, masks)
        loss.backward()
        on_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def four_images(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Images [4, 3, 64, 64] of quadrants whose colour is their class, and masks [4, 64, 64] uint8, all labelled."""
    draw = torch.Generator().manual_seed(1)
    masks = torch.randint(0, CLASSES, (4, 2, 2), generator=draw).repeat_interleave(SIDE // 2, 1)
    masks = masks.repeat_interleave(SIDE // 2, 2)
    colours = 1.5 * torch.randn(CLASSES, 3, generator=draw)
    images = colours[masks].permute(0, 3, 1, 2) + 0.2 * torch.randn(4, 3, SIDE, SIDE, generator=draw)
    return images.contiguous().to(device), masks.to(torch.uint8).to(device)


def deterministic_mode(network: Segmenter) -> Segmenter:
    """Set training mode, but dropout and batch norm to evaluation mode: a pass then only depends on its images."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or "drop" in type(module).__name__.lower():
            module.eval()
    return network


def gradients_of(
    network: Segmenter,
    parts: int = 1,
    autocast: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[float, dict[str, Tensor]]:
    """The loss of the four images and the gradient of every trained parameter, accumulated over `parts` equal parts."""
    device = device_of(network)
    images, masks = four_images(device)
    network.zero_grad(set_to_none=True)
    total = 0.0
    for x, y in zip(images.chunk(parts), masks.chunk(parts), strict=True):
        torch.manual_seed(0)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss, _ = network(x.contiguous(memory_format=memory_format), y)
        (loss / parts).backward()
        total += loss.item() / parts
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in network.trained_parameters()
    }
    network.zero_grad(set_to_none=True)
    return total, gradients


def first_difference(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-3) -> str | None:
    """The first gradient that differs by more than rounding, relative to its own norm and to the total norm."""
    size = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    for name, gradient in expected.items():
        difference = (ours[name] - gradient).norm().item()
        if not difference <= tolerance * gradient.norm().item() + 1e-5 * size:
            return f"{name} (by {difference:.2g} of {gradient.norm().item():.2g})"
    return None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether any bit differs; NaN equals NaN."""
    return one.shape != other.shape or not torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in before.items() if name not in after or _differ(tensor, after[name])]


def _with_gradient(network: Segmenter) -> set[str]:
    return {name for name, p in network.trained_parameters() if p.grad is not None and bool(p.grad.ne(0).any())}


def _moving(network: Segmenter) -> set[int]:
    """Identities of the tensors that training may change: trained parameters, and buffers of what is not frozen."""
    moving = {id(parameter) for _, parameter in network.trained_parameters()}
    for module in network.modules():
        if not network.backbone.is_frozen(module):
            moving.update(id(buffer) for buffer in module.buffers(recurse=False))
    return moving


def _is_copy(tensor: Tensor, pretrained: Tensor) -> bool:
    """Constants do not count: a fresh running mean is zero everywhere."""
    return tensor.shape == pretrained.shape and bool((tensor != tensor.flatten()[:1]).any()) and not _differ(
        tensor, pretrained
    )  # fmt: skip
