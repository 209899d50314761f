"""The places inside a backbone where a method attaches modules: blocks, their residual branches, and any named layer.

A method chooses a place and the view of its module, tokens or map; this module finds the attribute of the block and the
layout of its activations. Modules are attached with hooks (`hooks.py`) and registered in `added`, so that the network's
own modules, their names and their frozen tensors do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harness.models.backbones import hooks
from harness.models.backbones.deprecated import FormerNames
from harness.models.backbones.family import ROLES, BranchKind, BranchPath, Family, Layout
from harness.models.backbones.hooks import PatchGrid, Shape, View

__all__ = ["AttachPoints", "Block", "Branch", "BranchKind", "Layout", "PatchGrid", "View"]


@dataclass(frozen=True)
class Block:
    """One block of the network: y = block(x)."""

    index: int
    """Over the whole network, in order of execution."""
    stage: int
    module: nn.Module
    channels: int
    """Of its output."""
    layout: Layout
    """Of its output."""


@dataclass(frozen=True)
class Branch(BranchPath):
    """One residual branch of a block: y = x + exit(f(entry(x)))."""

    stage: int
    block: int
    """The block's index."""
    module: nn.Module
    """The block."""
    channels: int
    """Of input and output."""

    @property
    def name(self) -> str:
        return f"{self.kind} of block {self.block}"


@dataclass(eq=False)
class _Attachment:
    """One attached module, for `remove`."""

    module: nn.Module
    registry: nn.ModuleDict
    key: str
    handles: tuple[RemovableHandle, ...] = ()


class AttachPoints(FormerNames, nn.Module):
    """The part of `StagedBackbone` that methods use to attach modules.

    Every `insert_` and `add_` takes the place first, then the module, which it registers to be trained. `insert_` is
    sequential: the signal passes through the module; `add_` is parallel: the module's output is added. Where a `view`
    can be chosen, the module sees and returns `tokens` or a `map`; otherwise the layer's own layout, unless stated.
    """

    name: str
    stages: nn.ModuleList
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    layout: Layout
    prefix_tokens: int
    gaps: nn.ModuleDict
    added: nn.ModuleDict

    def _open_attach_points(self, family: Family) -> None:
        """Called once, when the network's own modules are complete."""
        self.added = nn.ModuleDict()
        """Attached modules, by place."""
        self._family = family
        self._state = hooks.ForwardState()
        self._attachments: list[_Attachment] = []
        self._own = {name: module for name, module in self.named_modules() if name}

    # ---- the places ----------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[Block]:
        """The blocks of every stage, in order of execution, for all families."""
        found: list[Block] = []
        for stage, container in enumerate(self.stages):
            own = getattr(container, "blocks", container)
            nested = own is container and any(isinstance(child, nn.Sequential) for child in container.children())
            for module in _blocks_in(own):
                channels = _out_channels(module) if nested else self.channels[stage]
                found.append(Block(len(found), stage, module, channels, self._layout_of(module)))
        return found

    @cached_property
    def branches(self) -> list[Branch]:
        """The residual branches of all blocks, in order of execution. Empty for convolutional blocks like those of
        ResNet and MobileNet: there, methods use `layers("conv")`."""
        return [
            Branch(**vars(path), stage=block.stage, block=block.index, module=block.module, channels=block.channels)
            for block in self.blocks
            for path in self._family.branches(block.module)
        ]

    @property
    def unbranched_blocks(self) -> list[Block]:
        """The blocks that have no residual branches in `branches`."""
        branched = {branch.block for branch in self.branches}
        return [block for block in self.blocks if block.index not in branched]

    def norms(self) -> dict[str, nn.Module]:
        """Name -> normalisation module with an affine part that came with the network."""
        return {
            name: module
            for name, module in self._own.items()
            if "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))
        }

    def layers(self, *roles: str) -> list[str]:
        """Names of the network's own Linear and Conv2d modules by role, relative to the backbone; no role: all.

        `qkv`, `q`, `k`, `v`, `kv`: projections into attention, fused or apart as the network has them; `proj`: out of
        it. `fc1`, `gate`, `fc2`: MLP; a fused SwiGLU is `fc1`, one that is not has its activated half in `gate`.
        `joint_in`, `joint_out`: projections that attention and MLP share. `conv`: convolutions of one group, `grouped`:
        depth-wise and grouped ones, `se`: channel attention, `merge`: between stages of a transformer, `stem`: before
        the first stage. Modules that are not called as a layer (position-bias networks) have no role.
        Raises `ValueError` for an unknown role.
        """
        if unknown := set(roles) - ROLES:
            raise ValueError(f"no role {sorted(unknown)[0]}; roles are {', '.join(sorted(ROLES))}")
        return [name for name, role in self.roles().items() if not roles or role in roles]

    def roles(self) -> dict[str, str]:
        """Name -> role for all of `layers()`."""
        named = ((name, self._family.role(name, module)) for name, module in self._own.items())
        return {name: role for name, role in named if role is not None}

    # ---- sequential: the signal passes through the module --------------------------------------------------------

    def insert_at_entry(self, branch: Branch, module: nn.Module, view: View = "tokens") -> None:
        """The output of the branch's norm passes through `module` before the branch's linear layers.

        Raises `ValueError` where `branch.entry` is None (post-norm blocks).
        """
        if branch.entry is None:
            raise ValueError(f"the {branch.name} has no norm at its entry")
        target = branch.module.get_submodule(branch.entry)
        hook = hooks.AfterPlace(module, view, Shape(branch.entry_layout, branch.stage), self)
        self._attach(module, target, "entry", target.register_forward_hook(hook))

    def insert_at_exit(self, branch: Branch, module: nn.Module, view: View = "tokens") -> None:
        """The branch's output passes through `module` before it is added to the residual stream."""
        target = branch.module.get_submodule(branch.exit)
        hook = hooks.AfterPlace(module, view, Shape(branch.layout, branch.stage), self)
        self._attach(module, target, "exit", target.register_forward_hook(hook))

    def insert_after_block(self, block: Block, module: nn.Module, view: View = "tokens") -> None:
        """The block's output passes through `module`; the next block, stage and head see the result."""
        hook = hooks.AfterPlace(module, view, Shape(block.layout, block.stage), self)
        self._attach(module, block.module, "after", block.module.register_forward_hook(hook))

    def insert_after_stage(self, stage: int, module: nn.Module) -> None:
        """The map behind `stage` (0-based), [B, C_i, H'/s_i, W'/s_i] of the canvas, passes through `module`.

        Raises `IndexError` for a stage that does not exist, `ValueError` if there already is a module.
        """
        if not 0 <= stage < len(self.stages):
            raise IndexError(f"no stage {stage} in {self.name}, which has {len(self.stages)}")
        if str(stage) in self.gaps:
            raise ValueError(f"stage {stage} of {self.name} already has a module after it")
        self._register(module, self.gaps, str(stage))

    def insert_after(self, layer: str, module: nn.Module) -> None:
        """After any layer by its name: y = module(layer(x))."""
        target = self.get_submodule(layer)
        self._attach(module, target, "after", target.register_forward_hook(hooks.AfterLayer(module)))

    def insert_before(self, layers: str | Sequence[str], module: nn.Module) -> None:
        """Before one or more Linear and Conv2d layers by name: y = layer(module(x)).

        `module` sees channels last. Layers that share their input share the module.
        """
        names = [layers] if isinstance(layers, str) else list(layers)
        targets = [self.get_submodule(name) for name in names]
        handles = [target.register_forward_pre_hook(hooks.BeforeLayer(module)) for target in targets]
        self._attach(module, targets[0], "before", *handles)

    def insert_prompts(self, prompts: nn.Module, length: int, deep: bool) -> None:
        """Prompt tokens in a ViT: `prompts(block index)` gives [length, C] or [B, length, C].

        They follow the prefix tokens and become part of them. Shallow: they are inserted before the first block and
        stay. Deep: each block's prompts replace the previous block's outputs at their positions.
        Raises `ValueError` for networks that are not one sequence of tokens. `remove` does not remove them.
        """
        if self.layout != "NLC" or len(set(self.strides)) > 1:
            raise ValueError("prompt tokens need a network that is one sequence of tokens")
        if "prompts" in self.added:
            raise ValueError(f"{self.name} already has prompt tokens")
        self.added["prompts"] = prompts
        before = self.prefix_tokens
        for block in self.blocks:
            if block.index == 0 or deep:
                insert = hooks.InsertPrompts(prompts, block.index, before, length if block.index else 0)
                block.module.register_forward_pre_hook(insert)
            for inner in block.module.modules():
                if hasattr(inner, "num_prefix_tokens"):  # tokens that rotary embeddings leave out
                    inner.num_prefix_tokens += length
        self.prefix_tokens += length

    def insert_at_output(self, module: nn.Module) -> None:
        """Between backbone and head: `module` maps the list of maps to a list of maps of the same channels.

        Raises `ValueError` if there already is a module.
        """
        if "output" in self.added:
            raise ValueError(f"there already is a module between {self.name} and the head")
        self._register(module, self.added, "output")

    # ---- parallel: the module's output is added ------------------------------------------------------------------

    def add_to_branch(
        self, branch: Branch, module: nn.Module, view: View = "tokens", before_entry: bool = True
    ) -> None:
        """y = x + exit(f(entry(x))) + module(x), or + module(entry(x)) without `before_entry`.

        In post-norm blocks nothing but x enters the branch, and both are the same.
        """
        target = branch.module.get_submodule(branch.exit)
        shape = Shape(branch.layout, branch.stage)
        if before_entry or branch.entry is None:
            source = branch.module.get_submodule(branch.source) if branch.source else branch.module
            branch_input = hooks.BranchInput(self._state, shape)
            keep = source.register_forward_pre_hook(branch_input.before)
        else:
            entry = branch.module.get_submodule(branch.entry)
            branch_input = hooks.BranchInput(self._state, Shape(branch.entry_layout, branch.stage))
            keep = entry.register_forward_hook(branch_input.after)
        add = target.register_forward_hook(hooks.ParallelBranch(module, view, branch_input, shape, self))
        self._attach(module, target, "parallel", keep, add)

    def add_to_layer(self, layer: str, module: nn.Module, through: str | None = None) -> None:
        """Parallel to any layer or block by its name: y = layer(x) + module(x).

        `through` names the last of several layers that run one after another: y = through(... layer(x)) + module(x).
        """
        first, last = self.get_submodule(layer), self.get_submodule(through or layer)
        hook = hooks.ParallelLayers(module, self._state)
        keep, add = first.register_forward_pre_hook(hook.before), last.register_forward_hook(hook.after)
        self._attach(module, first, "beside", keep, add)

    def add_to_stream(self, place: Branch | Block, module: nn.Module) -> None:
        """After a block, or after a branch's residual addition: the stream x becomes x + module(x), as tokens.

        After a branch, where x = x + f, this is computed as y = x + (f + module(x + f)).
        """
        if isinstance(place, Block):
            inserted: list[nn.Module] = [hooks.Residual(module)]
            self.insert_after_block(place, inserted[0])
        else:
            stream = hooks.StreamChange(module)
            inserted = [hooks.NoteInput(stream), stream]
            self.add_to_branch(place, inserted[0])
            self.insert_at_exit(place, stream)
        for attachment in self._attachments[-len(inserted) :]:
            attachment.module = module

    # ---- removal and geometry ------------------------------------------------------------------------------------

    def remove(self, module: nn.Module) -> None:
        """Undo every `insert_` and `add_` of `module`, except for prompts: its hooks and its registration.

        Raises `ValueError` where it is not attached.
        """
        found = [attachment for attachment in self._attachments if attachment.module is module]
        if not found:
            raise ValueError(f"this {type(module).__name__} is not attached to {self.name}")
        for attachment in found:
            for handle in attachment.handles:
                handle.remove()
            del attachment.registry[attachment.key]
            self._attachments.remove(attachment)

    def patch_grid(self, place: Branch | Block) -> PatchGrid:
        """The helper with which a module convolves the tokens at this place; see `PatchGrid`."""
        return PatchGrid(self, place.stage)

    def as_map(self, x: Tensor, place: Branch | Block) -> Tensor:
        """[B, C, h, w] of channels-last activations at a place, without prefix tokens. Only during a forward pass."""
        return self.stage_map(x, place.stage)

    def from_map(self, feature_map: Tensor, x: Tensor) -> Tensor:
        """The inverse of `as_map`, in the shape of `x`, from which prefix tokens are copied."""
        prefix = x[:, : self.count_prefix_tokens(x)] if x.dim() == 3 else None
        return hooks.shaped_like(feature_map, x, prefix)

    def grid(self, stage: int) -> tuple[int, int]:
        """(h, w) of the stage's maps in the current forward pass. Raises `RuntimeError` outside of one."""
        if self._state.size is None:
            raise RuntimeError("the grid is only known during a forward pass")
        height, width = self._state.size
        return height // self.strides[stage], width // self.strides[stage]

    def count_prefix_tokens(self, x: Tensor) -> int:
        """The number of prefix tokens, which only networks with one sequence of tokens have."""
        return self.prefix_tokens if x.dim() == 3 else 0

    def stage_map(self, x: Tensor, stage: int) -> Tensor:
        """[B, C, h, w] of a stage's channels-last activations, without prefix tokens."""
        if x.dim() == 4:
            return x.permute(0, 3, 1, 2)
        height, width = self.grid(stage)
        patches = x[:, self.count_prefix_tokens(x) :]
        return patches.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)

    def _layout_of(self, block: nn.Module) -> Layout:
        """The layout of a block's output: its last branch's, except in Swin, which restores the map's shape."""
        branches = self._family.branches(block)
        return branches[-1].layout if branches and self.layout == "NCHW" else self.layout

    def _attach(self, module: nn.Module, target: nn.Module, place: str, *handles: RemovableHandle) -> None:
        """Register `module` under the target's name and the place. Raises `ValueError` for a foreign target."""
        path = next((name for name, known in self._own.items() if known is target), None)
        if path is None:
            for handle in handles:
                handle.remove()
            raise ValueError(f"{type(target).__name__} did not come with {self.name}")
        stem = key = f"{path.replace('.', '_')}_{place}"
        count = 1
        while key in self.added:
            count += 1
            key = f"{stem}_{count}"
        self._register(module, self.added, key, *handles)

    def _register(self, module: nn.Module, registry: nn.ModuleDict, key: str, *handles: RemovableHandle) -> None:
        registry[key] = module
        self._attachments.append(_Attachment(module, registry, key, handles))


def _blocks_in(container: nn.Module) -> Iterator[nn.Module]:
    for child in container.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _blocks_in(child)
        else:
            yield child


def _out_channels(block: nn.Module) -> int:
    """Channels of the last layer that is not channel attention; it may be a container of layers. 0 if there is none."""
    children = [child for name, child in block.named_children() if name != "se"]
    channels = (int(getattr(child, "out_channels", 0)) or _out_channels(child) for child in reversed(children))
    return next((found for found in channels if found), 0)
