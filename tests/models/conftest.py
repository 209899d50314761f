"""Backbones with random weights, built once per session."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.weights import Weights, load_backbone


@pytest.fixture(scope="session")
def pristine() -> Callable[[str], StagedBackbone]:
    """name -> a backbone with random weights that nobody has changed: a copy of one that is built once.

    What timm initialises to (almost) zero, so that a branch outputs zero at the start, is drawn at random.
    """
    built: dict[str, StagedBackbone] = {}

    def get(name: str) -> StagedBackbone:
        if name not in built:
            built[name] = load_backbone(name, Weights("random", "random"), seed=0)
            generator = torch.Generator().manual_seed(0)
            for parameter in built[name].parameters():
                if parameter.abs().max() < 1e-3:
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) / 10)
        return copy.deepcopy(built[name])

    return get
