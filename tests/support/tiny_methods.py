"""Small networks with random weights and methods on them, a few steps of training, and counts on full-size shapes."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from harness.method import Method, methods
from harness.models.backbones import families
from harness.models.backbones.backbone import StagedBackbone
from harness.models.network import Segmenter, build_segmenter

SMALL_VIT = {"depth": 4, "embed_dim": 64, "num_heads": 2}
NETWORKS = {
    "resnet10t": {},
    "mobilenetv2_035": {},
    "convnext_atto": {"depths": (1, 1, 2, 1)},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
    "swinv2_tiny_window8_256": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"depth": 4},
    "vit_small_patch14_reg4_dinov2": SMALL_VIT,
    "vit_tiny_patch16_dinov3_qkvb": {"depth": 4},
    "eva02_tiny_patch14_224": {"depth": 4},
    "eva02_base_patch14_224": SMALL_VIT,
}
"""timm name -> arguments that make it small; a CNN of each kind, hierarchical transformers, ViTs, rotary ViTs."""
CLASSES = 3


@functools.cache
def _built(name: str) -> StagedBackbone:
    torch.manual_seed(0)
    built = families.cut(name, families.create(name, drop_path_rate=0.0, **NETWORKS.get(name, {})))
    for parameter in built.parameters():
        if parameter.abs().max() < 1e-3:  # a branch that timm starts at zero would hide what is inside it
            parameter.copy_(torch.rand(parameter.shape) / 10)
    return built


def backbone(name: str) -> StagedBackbone:
    """A frozen backbone of its own; a network that is not in `NETWORKS` has its full size."""
    return copy.deepcopy(_built(name))


def build(method: str | type[Method], network: StagedBackbone, **settings: object) -> Segmenter:
    """The number of trained parameters is checked on building."""
    cls = methods.get(method) if isinstance(method, str) else method
    return build_segmenter(network, cls(cls.Hyperparameters(**settings)), "fpn:8", CLASSES, seed=0)


def segmenter(method: str | type[Method], name: str, **settings: object) -> Segmenter:
    return build(method, backbone(name), **settings)


def batch(height: int = 64, width: int = 48) -> tuple[Tensor, Tensor]:
    """Two images [2, 3, height, width] and masks."""
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    return images, (torch.arange(2 * height * width) % CLASSES).reshape(2, height, width)


def train(network: Segmenter, steps: int = 2) -> set[str]:
    """The names of the trained parameters that no step gave a gradient."""
    network.train()
    optimizer = torch.optim.AdamW([parameter for _, parameter in network.trained_parameters()], lr=1e-2)
    silent = {name for name, _ in network.trained_parameters()}
    for _ in range(steps):
        loss, _ = network(*batch())
        loss.backward()
        silent -= {n for n, p in network.trained_parameters() if p.grad is not None and bool(p.grad.ne(0).any())}
        optimizer.step()
        optimizer.zero_grad()
    return silent


def disturb(network: Segmenter) -> None:
    """Move every trained parameter away from its initial value, as a training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in network.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(network: Segmenter) -> Tensor:
    with torch.no_grad():
        return network.eval()(batch()[0])


def close(ours: Tensor, expected: Tensor) -> bool:
    return bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1))


def assert_merges(network: Segmenter, plain: StagedBackbone) -> None:
    """A copy of the network, merged, has the same logits and the modules, hooks and names of the plain backbone."""
    before = logits(network)
    merged = copy.deepcopy(network)
    merged.method.merge(merged.backbone)
    assert close(logits(merged), before)
    assert len(merged.backbone.added) == 0 and _count_hooks(merged.backbone) == _count_hooks(plain)
    assert not any(parameter.requires_grad for parameter in merged.backbone.parameters())
    extra = merged.backbone.state_dict().keys() - plain.state_dict().keys()
    assert all(key.endswith(".bias") for key in extra)  # of layers that had none
    assert plain.state_dict().keys() <= merged.backbone.state_dict().keys()


def _count_hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


@functools.cache
def shapes(name: str) -> StagedBackbone:
    """The backbone at full size without memory, to count on. Not to be changed."""
    with torch.device("meta"):
        return families.cut(name, families.create(name))


def count(method: str | type[Method], name: str, **settings: object) -> int:
    """The closed form on the full-size network."""
    cls = methods.get(method) if isinstance(method, str) else method
    return cls(cls.Hyperparameters(**settings)).parameter_count(shapes(name), CLASSES)
