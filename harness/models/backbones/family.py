"""The contract of a backbone family: one class in one file of `families/` describes its networks.

It defines the cut into a stem and stages, the residual branches of the blocks, the roles of the layers, and a tiny
network for tests. `families/__init__.py` finds the classes; `backbone.py` turns a cut into a backbone.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import timm
from torch import Tensor, nn

Layout = Literal["NCHW", "NHWC", "NLC"]
"""How a network stores activations: a map with channels first or last, or a sequence of tokens."""
BranchKind = Literal["attention", "mlp", "conv", "joint"]
"""What a residual branch computes. `conv`: mixes neighbours without attention. `joint`: attention and MLP in one."""

SHARED_ROLES = {"qkv": "qkv", "q": "q", "kv": "kv"}
MLP_ROLES = {"fc1": "fc1", "fc2": "fc2", "fc1_x": "fc1", "fc1_g": "gate"}
ROLES = frozenset(
    {"qkv", "q", "k", "v", "kv", "proj", "fc1", "gate", "fc2", "joint_in", "joint_out"}
    | {"conv", "grouped", "se", "merge", "stem"}
)
"""The roles of layers that methods can select; `AttachPoints.layers` explains them."""


@dataclass(frozen=True)
class CutNetwork:
    """The parts of a network that `StagedBackbone` runs, and the shapes of its stages' outputs."""

    stem: nn.Module
    stages: Sequence[nn.Module]
    channels: Sequence[int]
    """Channels of each stage's output."""
    strides: Sequence[int]
    """Pixels of the image per cell of each stage's output."""
    layout: Layout = "NCHW"
    """Layout of the stages' outputs."""
    prefix_tokens: int = 0
    """Number of class and register tokens before the patches."""
    output_norm: nn.Module | None = None
    """Applied to a stage's output for the head, not for the next stage (the final norm of a ViT, as in DINOv2's
    `get_intermediate_layers`)."""
    trains_output_norms: bool = False
    """Whether the head trains a LayerNorm for each output that it reads, as mmsegmentation does for hierarchical
    networks whose stages end in no norm. Convolutional networks end theirs in batch norm, PVTv2 in its own; a ViT has
    its `output_norm`, or none where it belongs to the pooled features (EVA-02), as mmsegmentation's BEiT."""

    @classmethod
    def described(
        cls, stem: nn.Module, stages: Sequence[nn.Module], features: Sequence[Mapping[str, Any]], **other: Any
    ) -> CutNetwork:
        """Channels and strides from timm's `feature_info`, one entry per stage."""
        channels = [feature["num_chs"] for feature in features]
        return cls(stem, stages, channels, [feature["reduction"] for feature in features], **other)


@dataclass(frozen=True)
class BranchPath:
    """One residual branch of a block, y = x + exit(f(entry(x))), as names of modules inside the block."""

    kind: BranchKind
    source: str
    """The module whose input is the branch's input x; empty: the block itself."""
    entry: str | None
    """The norm whose output feeds the branch's linear layers; None in post-norm blocks, where x feeds them."""
    exit: str
    """The module through which the branch's output passes last (stochastic depth or layer scale)."""
    layout: Layout
    """Of input and output."""
    entry_layout: Layout
    """Layout of the entry's output."""


def branch_path(
    kind: BranchKind, source: str, entry: str | None, exit: str, layout: Layout, entry_layout: Layout | None = None
) -> BranchPath:
    return BranchPath(kind, source, entry, exit, layout, entry_layout or layout)


def pre_norm_branches(attention: Layout = "NLC") -> list[BranchPath]:
    """Attention and MLP of a pre-norm transformer block in timm's names."""
    return [
        branch_path("attention", "norm1", "norm1", "drop_path1", attention),
        branch_path("mlp", "norm2", "norm2", "drop_path2", "NLC"),
    ]


def post_norm_branches(attention: Layout = "NLC") -> list[BranchPath]:
    """Attention and MLP of a block whose norms follow them (residual post-norm)."""
    return [
        branch_path("attention", "", None, "drop_path1", attention),
        branch_path("mlp", "mlp", None, "drop_path2", "NLC"),
    ]


@dataclass(frozen=True)
class TinyNetwork:
    """A timm network that is small enough for tests of every method; its weights are random."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments for timm, where the smallest network of the family is not small enough."""


class Family(ABC):
    """The networks of one or more timm modules (`timm.models.resnet`, ...) that are cut in the same way.

    A subclass defines `modules` and `cut`; `branches` if its blocks have residual branches of attention, MLP or
    convolutions; `layer_roles` and `attention_gates` if the shared rules of `role` do not cover its layers' names;
    `from_published` and `from_openmmlab` if its files have other names than timm's. One instance serves all networks:
    it holds no state.
    """

    modules: ClassVar[Mapping[str, TinyNetwork]]
    """timm module -> its tiny network. Every architecture that the module registers belongs to the family."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Arguments for timm, so that a network accepts any canvas: images of multiples of its coarsest stride."""
    layer_roles: ClassVar[Mapping[str, str]] = {}
    """Role by the last part, or the last two parts, of a layer's name."""
    attention_gates: ClassVar[frozenset[str]] = frozenset()
    """Parts of names that mark the convolutions of channel attention (role `se`)."""

    @abstractmethod
    def cut(self, network: Any) -> CutNetwork:
        """Cut a network that was created without a classifier; it may be changed in place."""

    def branches(self, block: Any) -> list[BranchPath]:
        """The residual branches of a block, in order of execution; none in blocks like those of ResNet."""
        return []

    def from_published(self, tensors: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
        """The tensors of the authors' files under timm's names and in the network's sizes: timm's own filter for the
        module, where it has one. May raise anything for files in another layout."""
        filter_fn = getattr(timm_module(network), "checkpoint_filter_fn", None)
        return tensors if filter_fn is None else filter_fn(tensors, network)

    def from_openmmlab(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of mmsegmentation's and mmpretrain's networks under the names of the authors' or timm's files."""
        return tensors

    def role(self, name: str, layer: nn.Module) -> str | None:
        """One of `ROLES` for a Linear or Conv2d layer by its name in the backbone; None for any other module and for
        modules that are not called as a layer (position-bias networks)."""
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            return None
        if not name.startswith("stages."):
            return "stem"
        path = name.split(".")
        for known in (path[-1], ".".join(path[-2:])):
            if known in self.layer_roles:
                return self.layer_roles[known]
        if path[-1] in SHARED_ROLES:
            return SHARED_ROLES[path[-1]]
        if "mlp" in path and path[-1] in MLP_ROLES:
            return MLP_ROLES[path[-1]]
        if isinstance(layer, nn.Linear):
            return "proj" if path[-1] == "proj" else None
        if self.attention_gates & set(path):
            return "se"
        if path[2:3] == ["downsample"]:  # of the stage; a ResNet has its own inside blocks
            return "merge"
        return "conv" if layer.groups == 1 else "grouped"


def timm_module(network: Any) -> Any:
    """The module of timm that creates the network."""
    return sys.modules[timm.models.model_entrypoint(network.pretrained_cfg["architecture"]).__module__]


def rename(tensors: dict[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace regular expressions in the names, one after the other. Raises `ValueError` if two names become one."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"two tensors would be named {name}")
        renamed[name] = tensor
    return renamed


def call_fused_projections(network: nn.Module) -> None:
    """Make timm call the fused projection where queries and values have biases and keys have none. timm only reads its
    weight there, so that a method that replaces the module (LoRA) would have no effect."""
    for module in network.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
