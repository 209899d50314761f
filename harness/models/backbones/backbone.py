"""A pre-trained network seen as a stem and stages, frozen to the bit, with a named place behind every stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.backbones.attach import AttachPoints, Layout
from harness.models.backbones.lean_autograd import make_lean


class StageOutputs:
    """What the first stages of a backbone, which no method has touched, made of a batch of images.

    Not a dataclass, so that what converts the tensors of a model's arguments leaves these as they were computed.
    """

    __slots__ = ("outputs", "size")

    def __init__(self, outputs: Sequence[Tensor], size: tuple[int, int]):
        """`outputs`: of stages 0, 1, ..., each in the network's own layout; `size`: (H, W) of the images."""
        self.outputs = tuple(outputs)
        self.size = size

    def first(self, stages: int) -> StageOutputs:
        return StageOutputs(self.outputs[:stages], self.size)


class StagedBackbone(AttachPoints):
    """`stem`, then `stages`; after stage i the module in `gaps[i]`, if a method put one there.

    The places inside stages, and the one between backbone and head, are `AttachPoints`: blocks, branches, layers.

    A gap module sees and returns the stage's output as a map [B, C_i, H/s_i, W/s_i], whatever the network's own
    layout; prefix tokens (class, register) pass it untouched. Its result goes to the next stage and to the head.

    On construction every parameter is frozen and every module is in evaluation mode, and both stay so whatever
    `.train()` says: batch-norm statistics do not move and dropout stays off. `unfreeze` is the only way out. Modules
    that a method adds later are not frozen.
    """

    def __init__(
        self,
        name: str,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        strides: Sequence[int],
        layout: Layout = "NCHW",
        prefix_tokens: int = 0,
        output_norm: nn.Module | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        """`output_norm` is applied to what the head sees of a stage, not to what the next stage sees (the final
        norm of a ViT, as DINOv2's `get_intermediate_layers` does). `mean` and `std` are of RGB in 0..1."""
        super().__init__()
        self.name = name
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.gaps = nn.ModuleDict()
        self.output_norm = output_norm if output_norm is not None else nn.Identity()
        self.channels = tuple(channels)
        self.strides = tuple(strides)
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.pretrained_parameters = sum(parameter.numel() for parameter in self.parameters())
        self.requires_grad_(False)
        make_lean(self)
        self._open_sites()
        self._frozen = set(self.modules()) - {self, self.stages, self.gaps, self.added}
        self._made_of = [list(_shape_of(part)) for part in (self.stem, *self.stages)]
        self.train(False)

    @property
    def hierarchical(self) -> bool:
        """Whether the stages have different resolutions (CNN, Swin) or one (ViT)."""
        return len(set(self.strides)) > 1

    def forward(self, images: Tensor | StageOutputs) -> list[Tensor]:
        """images [B, 3, H, W], normalised, or what `prefix` made of them -> one map [B, C_i, H/s_i, W/s_i] a stage."""
        x, known = self._begin(images)
        maps = []
        for i, stage in enumerate(self.stages):
            x = known[i] if i < len(known) else stage(x)
            if str(i) in self.gaps:
                x = self._from_map(self.gaps[str(i)](self._to_map(x, i)), x)
            maps.append(self._to_map(self.output_norm(x), i))
        return self.added["output"](maps) if "output" in self.added else maps

    def count_frozen_stages(self) -> int:
        """How many stages from the image on are as they came: frozen, unhooked, of the same modules, no gap between.

        Their outputs depend on the images alone, whatever is trained. The gap behind the last of them may be taken.
        """
        if _is_intercepted(self) or type(self) is not StagedBackbone:
            return 0
        count = 0
        for part, before in zip((self.stem, *self.stages), self._made_of, strict=True):
            if list(_shape_of(part)) != before or not all(map(self._is_untouched, part.modules())):
                break
            count += 1
        gaps = [int(stage) + 1 for stage in self.gaps]
        return max(0, min([count - 1, *gaps]))

    @torch.no_grad()
    def prefix(self, images: Tensor | StageOutputs, stages: int) -> StageOutputs:
        """The outputs of the first `stages` stages (1 or more), which must be untouched; no graph is built.

        From images, or from a shorter prefix.
        """
        x, known = self._begin(images)
        outputs = list(known[:stages])
        for stage in self.stages[len(outputs) : stages]:
            x = stage(x)
            outputs.append(x)
        assert self._current.size is not None
        return StageOutputs(outputs, self._current.size)

    def _begin(self, images: Tensor | StageOutputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What goes into the first stage that is computed, and the outputs of those that are not."""
        if isinstance(images, Tensor):
            self._current.size = (images.shape[-2], images.shape[-1])
            return self.stem(images), ()
        self._current.size = images.size
        if hasattr(self.stem, "prepare"):
            self.stem.prepare(images.size)
        return images.outputs[-1], images.outputs

    def _is_untouched(self, module: nn.Module) -> bool:
        return (
            module in self._frozen
            and not _is_intercepted(module)
            and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        )

    def put_in_gap(self, stage: int, module: nn.Module) -> None:
        """Let `module` transform the map behind `stage` (0-based). A gap holds one module."""
        if not 0 <= stage < len(self.stages):
            raise IndexError(f"no stage {stage} in {self.name}, which has {len(self.stages)}")
        if str(stage) in self.gaps:
            raise ValueError(f"the gap behind stage {stage} of {self.name} is taken")
        self.gaps[str(stage)] = module

    def unfreeze(self, *targets: nn.Module | nn.Parameter) -> None:
        """Train a parameter, or a module with all that is in it, running statistics included."""
        for target in targets:
            target.requires_grad_(True)
            if isinstance(target, nn.Module):
                self._frozen -= set(target.modules())

    def is_frozen(self, module: nn.Module) -> bool:
        """Whether the module came with the network and was not un-frozen: its buffers do not move."""
        return module in self._frozen

    def train(self, mode: bool = True) -> StagedBackbone:
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def _to_map(self, x: Tensor, stage: int) -> Tensor:
        if self.layout == "NCHW":
            return x
        feature_map = self._map_of(x, stage)
        return feature_map.contiguous() if self.layout == "NHWC" else feature_map

    def _from_map(self, feature_map: Tensor, x: Tensor) -> Tensor:
        """The inverse of `_to_map`; prefix tokens are taken from `x`, the stage's own output."""
        return feature_map if self.layout == "NCHW" else self.from_map(feature_map, x)


def _is_intercepted(module: nn.Module) -> bool:
    """Whether a call of the module is not just its class's `forward`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _shape_of(part: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What a part of a network is made of: its modules, their places and classes."""
    for name, module in part.named_modules():
        yield name, module, type(module)
