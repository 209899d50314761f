"""RegNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from harness.models.backbones.family import CutNetwork, Family, TinyNetwork, timm_module


class RegNet(Family):
    """RegNet X, Y, Z and V: Radosavovic et al., arXiv 2003.13678. The convolution for the classifier is left out."""

    modules = {"regnet": TinyNetwork("regnety_002")}
    attention_gates = frozenset({"se"})

    def from_published(self, tensors: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
        return timm_module(network)._filter_fn(tensors)

    def cut(self, network: Any) -> CutNetwork:
        stages = [network.s1, network.s2, network.s3, network.s4]
        return CutNetwork.described(network.stem, stages, network.feature_info[1:])
