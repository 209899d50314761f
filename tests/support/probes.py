"""Modules to attach to a backbone that show what they saw, and images for it."""

from __future__ import annotations

import torch
from torch import nn


class Probe(nn.Module):
    """scale·x, and what it saw."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        self.seen = tuple(x.shape)
        self.input = x.detach()
        return self.scale * x


class Prompts(nn.Module):
    def __init__(self, width: int, depth: int = 1):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(depth, 3, width))

    def forward(self, block):
        return self.tokens[block]


def images(height=64, width=96):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def pick(backbone):
    """The first and the last branch of each kind."""
    kinds = {branch.kind for branch in backbone.branches}
    return [found[i] for kind in kinds for found in [[b for b in backbone.branches if b.kind == kind]] for i in (0, -1)]
