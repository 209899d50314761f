"""A frozen pre-trained network as a stem and stages: its forward pass, and which of its parts are frozen.

`attach.py` attaches methods' modules; a family's file cuts a timm network into stem and stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from harness.models.backbones.attach import AttachPoints
from harness.models.backbones.family import CutNetwork, Family
from harness.models.backbones.lean_autograd import make_lean
from harness.models.backbones.tensor_files import ImageNorm


class StageOutputs:
    """The outputs of a backbone's first, frozen stages for a batch of images.

    Not a dataclass, so that code that converts the tensors in a model's arguments does not change these.
    """

    __slots__ = ("outputs", "size")

    def __init__(self, outputs: Sequence[Tensor], size: tuple[int, int]):
        """`outputs`: those of stages 0, 1, ..., in the network's own layout; `size`: (H, W) of the images."""
        self.outputs = tuple(outputs)
        self.size = size

    def first(self, stages: int) -> StageOutputs:
        return StageOutputs(self.outputs[:stages], self.size)


class StagedBackbone(AttachPoints):
    """`stem`, then `stages`; after stage i the module in `gaps[i]` if a method inserted one.

    `AttachPoints` has the places where methods attach modules: stages, blocks, branches, layers, the output.

    Images are padded to the `canvas` before the stem, so no layer drops or pads a row by itself: the map of stage i
    is [B, C_i, H'/s_i, W'/s_i] for a canvas H'×W', and covers exactly the canvas.

    A module after a stage sees and returns the stage's output as such a map, whatever the network's own layout; prefix
    tokens (class, register) pass unchanged. Its result goes to the next stage and to the head.

    On construction every parameter is frozen and every module is in evaluation mode. `.train()` does not change that:
    batch-norm statistics do not move and dropout stays off; only `unfreeze` does. Modules that a method adds later are
    not frozen. Stochastic depth, which the budget sets, acts in training whatever is frozen.
    """

    def __init__(self, name: str, family: Family, network: CutNetwork, mean: Sequence[float], std: Sequence[float]):
        """`mean` and `std`: of the images that the network was trained on, RGB in 0..1."""
        super().__init__()
        self.name = name
        self.stem = network.stem
        self.stages = nn.ModuleList(network.stages)
        self.gaps = nn.ModuleDict()
        self.output_norm = network.output_norm if network.output_norm is not None else nn.Identity()
        self.channels = tuple(network.channels)
        self.strides = tuple(network.strides)
        self.layout = network.layout
        self.prefix_tokens = network.prefix_tokens
        self.trains_output_norms = network.trains_output_norms
        self.pretrained_norm = ImageNorm(tuple(mean), tuple(std))
        self.stated_norm: ImageNorm | None = None
        """What the file of the weights states; it takes precedence."""
        self.notes: tuple[str, ...] = ()
        """Lines for a run's log: how the tensors of a file of weights were matched."""
        self.norm_source = ""
        """Why images are normalised by `norm`."""
        self.norm_doubt = ""
        """Why that may be wrong; empty if it is known."""
        self.pretrained_parameters = sum(parameter.numel() for parameter in self.parameters())
        self.requires_grad_(False)
        make_lean(self)
        self._open_attach_points(family)
        self._frozen = set(self.modules()) - {self, self.stages, self.gaps, self.added}
        self._frozen -= {module for module in self.modules() if isinstance(module, DropPath)}
        self._pretrained_structure = [list(_structure_of(part)) for part in (self.stem, *self.stages)]
        self.train(False)

    @property
    def norm(self) -> ImageNorm:
        """Mean and std by which images are normalised."""
        return self.stated_norm or self.pretrained_norm

    @property
    def mean(self) -> tuple[float, ...]:
        return self.norm.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.norm.std

    @property
    def hierarchical(self) -> bool:
        """Whether the stages have different resolutions (CNN, Swin) or one (ViT)."""
        return len(set(self.strides)) > 1

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H', W') for images of `size` (H, W): rounded up to multiples of the coarsest stride.

        The image is its upper left part; the rest has the mean colour. Logits and labels are aligned with an image only
        through the canvas: see `Segmenter.image_logits` and `Segmenter.canvas_labels`.
        """
        multiple = math.lcm(*self.strides)
        return math.ceil(size[0] / multiple) * multiple, math.ceil(size[1] / multiple) * multiple

    def forward(self, images: Tensor | StageOutputs) -> list[Tensor]:
        """images [B, 3, H, W], normalised, or their `prefix` -> one map [B, C_i, H'/s_i, W'/s_i] per stage."""
        x, known = self._begin(images)
        maps = []
        for i, stage in enumerate(self.stages):
            x = known[i] if i < len(known) else stage(x)
            if str(i) in self.gaps:
                x = self._from_map(self.gaps[str(i)](self._to_map(x, i)), x)
            maps.append(self._to_map(self.output_norm(x), i))
        return self.added["output"](maps) if "output" in self.added else maps

    def count_frozen_stages(self) -> int:
        """Number of stages from the image on that are unchanged: frozen, without hooks, with their original modules.

        Their outputs only depend on the images. A module may be inserted after the last of them.
        """
        if _is_intercepted(self) or type(self) is not StagedBackbone:
            return 0
        count = 0
        for part, before in zip((self.stem, *self.stages), self._pretrained_structure, strict=True):
            if list(_structure_of(part)) != before or not all(map(self._is_as_pretrained, part.modules())):
                break
            count += 1
        gaps = [int(stage) + 1 for stage in self.gaps]
        return max(0, min([count - 1, *gaps]))

    @torch.no_grad()
    def prefix(self, images: Tensor | StageOutputs, stages: int) -> StageOutputs:
        """The outputs of the first `stages` stages (1 or more), which must be unchanged; no graph is built.

        Computed from images, or from a shorter prefix.
        """
        x, known = self._begin(images)
        outputs = list(known[:stages])
        for stage in self.stages[len(outputs) : stages]:
            x = stage(x)
            outputs.append(x)
        return StageOutputs(outputs, _size_of(images))

    def _begin(self, images: Tensor | StageOutputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The input of the first stage to compute, and the outputs of the stages before it."""
        canvas = self._state.size = self.canvas(_size_of(images))
        if isinstance(images, Tensor):
            return self.stem(pad_to(images, canvas)), ()
        if hasattr(self.stem, "prepare"):
            self.stem.prepare(canvas)
        return images.outputs[-1], images.outputs

    def _is_as_pretrained(self, module: nn.Module) -> bool:
        return (
            module in self._frozen
            and not _is_intercepted(module)
            and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        )

    def unfreeze(self, *targets: nn.Module | nn.Parameter) -> None:
        """Train a parameter, or a module with everything in it, running statistics included."""
        for target in targets:
            target.requires_grad_(True)
            if isinstance(target, nn.Module):
                self._frozen -= set(target.modules())

    def is_frozen(self, module: nn.Module) -> bool:
        """Whether the module came with the network and was not un-frozen; its buffers do not move."""
        return module in self._frozen

    def train(self, mode: bool = True) -> StagedBackbone:
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def _to_map(self, x: Tensor, stage: int) -> Tensor:
        if self.layout == "NCHW":
            return x
        feature_map = self.stage_map(x, stage)
        return feature_map.contiguous() if self.layout == "NHWC" else feature_map

    def _from_map(self, feature_map: Tensor, x: Tensor) -> Tensor:
        """The inverse of `_to_map`; prefix tokens are taken from `x`, the stage's own output."""
        return feature_map if self.layout == "NCHW" else self.from_map(feature_map, x)


def pad_to(x: Tensor, size: tuple[int, int], value: float = 0) -> Tensor:
    """[..., H, W] with `value` at the lower and right border up to `size`. Zero is the mean colour of an image."""
    bottom, right = size[0] - x.shape[-2], size[1] - x.shape[-1]
    return F.pad(x, (0, right, 0, bottom), value=value) if bottom or right else x


def _size_of(images: Tensor | StageOutputs) -> tuple[int, int]:
    return (images.shape[-2], images.shape[-1]) if isinstance(images, Tensor) else images.size


def _is_intercepted(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its class's `forward`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _structure_of(part: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Names, modules and classes of a part of a network."""
    for name, module in part.named_modules():
        yield name, module, type(module)
