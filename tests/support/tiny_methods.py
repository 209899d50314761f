"""One small network a family, and a few steps of training, for the tests of methods."""

import copy

import torch

from harness.models.backbones import families
from harness.models.network import build_segmenter

BACKBONES = [
    "resnet10t",
    "mobilenetv2_035",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b0",
    "vit_tiny_patch16_224",
    "eva02_tiny_patch14_224",
]
SMALLER = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"depth": 4},
    "eva02_tiny_patch14_224": {"depth": 4},
}
CLASSES = 5
_bare = {}


def backbone(name):
    """With random weights, and no branch that is silent because its last norm or its scale starts near zero."""
    if name not in _bare:
        torch.manual_seed(0)
        _bare[name] = families.cut(name, families.create(name, **SMALLER.get(name, {})))
        with torch.no_grad():
            for key, parameter in _bare[name].named_parameters():
                if key.endswith("gamma"):
                    parameter.fill_(0.5)
            for norm in _bare[name].norms().values():
                norm.weight.fill_(1.0)
    return copy.deepcopy(_bare[name])


def segmenter(method, name, **settings):
    return build_segmenter(backbone(name), method(method.Hyperparameters(**settings)), "fpn:16", CLASSES, seed=0)


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    return images, torch.randint(0, CLASSES, (2, 64, 64), generator=generator, dtype=torch.uint8)


def train(network, steps):
    """Returns the names of the parameters that no step gave a gradient."""
    silent = {name for name, _ in network.trained_parameters()}
    optimizer = torch.optim.AdamW([p for _, p in network.trained_parameters()], lr=1e-2)
    network.train()
    for _ in range(steps):
        loss, _ = network(*batch())
        loss.backward()
        silent -= {name for name, p in network.trained_parameters() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
        optimizer.zero_grad()
    return silent
