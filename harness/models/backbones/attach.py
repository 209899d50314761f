"""The places inside a backbone where a method stands: blocks, their residual branches, and any named layer.

A method asks for a place and for the view its module works on, tokens or map; which attribute of which block that is,
and in which layout a family keeps its activations there, is this module's business. Modules are attached with hooks
and registered in `added`, so that the network's own modules keep their identity, their names and their frozen bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

Layout = Literal["NCHW", "NHWC", "NLC"]
View = Literal["tokens", "map"]
"""What an added module sees and returns. `tokens`: channels last, [B, ..., C], prefix tokens among them. `map`:
[B, C, h, w], without prefix tokens: they pass a sequential module untouched and a parallel one adds nothing to them."""

Kind = Literal["attention", "mlp", "conv", "joint"]


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
class Branch:
    """One residual branch of a block: y = x + exit(f(entry(x))). Dotted names are relative to the block."""

    kind: Kind
    """`conv`: mixes neighbours without attention. `joint`: attention and MLP side by side in one branch."""
    stage: int
    block: int
    module: nn.Module
    """The block."""
    source: str
    """The module whose input is the branch's input x; empty: the block itself."""
    entry: str | None
    """The norm whose output feeds the branch's linear layers; None in post-norm blocks, where x feeds them."""
    exit: str
    """The module through which the branch's output passes last (stochastic depth or layer scale)."""
    channels: int
    """Of input and output."""
    layout: Layout
    """Of input and output."""
    entry_layout: Layout
    """Of what the entry puts out."""

    @property
    def name(self) -> str:
        return f"{self.kind} of block {self.block}"


@dataclass(frozen=True)
class _Shape:
    """How to read a tensor at one place."""

    layout: Layout
    stage: int


class _Current:
    """What is noted during one forward pass; not copied with the network."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        self.kept: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Current, ()


class AttachPoints(nn.Module):
    """What `StagedBackbone` offers to methods. Every `add_` registers the module it is given, to be trained."""

    name: str
    stages: nn.ModuleList
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    layout: Layout
    prefix_tokens: int

    def _open_sites(self) -> None:
        """Called once, when the network's own modules are complete."""
        self.added = nn.ModuleDict()
        """Modules that methods put in, by place."""
        self._current = _Current()
        self._own = {name: module for name, module in self.named_modules() if name}

    @property
    def blocks(self) -> list[Block]:
        """The blocks of every stage, in order of execution, for all families."""
        found = []
        for stage, container in enumerate(self.stages):
            inner = list(_blocks_in(getattr(container, "blocks", container)))
            nested = any(isinstance(child, nn.Sequential) for child in container.children()) and not hasattr(
                container, "blocks"
            )
            for module in inner:
                channels = _out_channels(module) if nested else self.channels[stage]
                layout = _block_layout(module, self.layout)
                found.append(Block(len(found), stage, module, channels, layout))
        return found

    @cached_property
    def branches(self) -> list[Branch]:
        """The residual branches of all blocks, in order of execution. Empty where the blocks are convolutional in the
        manner of ResNet and MobileNet: there, methods work on `layers("conv")`."""
        return [
            Branch(stage=block.stage, block=block.index, module=block.module, channels=block.channels, **parts)
            for block in self.blocks
            for parts in _branches_of(block.module)
        ]

    def add_at_exit(self, branch: Branch, module: nn.Module, view: View = "tokens") -> None:
        """Sequential: the branch's output passes through `module` before it is added to the residual stream."""
        target = branch.module.get_submodule(branch.exit)
        self._register(target, "exit", module)
        target.register_forward_hook(_After(module, view, _Shape(branch.layout, branch.stage), self))

    def add_at_entry(self, branch: Branch, module: nn.Module, view: View = "tokens") -> None:
        """Sequential: what the branch's norm puts out passes through `module` before the branch's linear layers.

        Raises `ValueError` where `branch.entry` is None (post-norm blocks).
        """
        if branch.entry is None:
            raise ValueError(f"the {branch.name} has no norm at its entry")
        target = branch.module.get_submodule(branch.entry)
        self._register(target, "entry", module)
        target.register_forward_hook(_After(module, view, _Shape(branch.entry_layout, branch.stage), self))

    def add_parallel(self, branch: Branch, module: nn.Module, before_entry: bool = True, view: View = "tokens") -> None:
        """Parallel: y = x + exit(f(entry(x))) + module(x), or + module(entry(x)) without `before_entry`.

        In post-norm blocks nothing but x enters the branch, and both are the same.
        """
        exit = branch.module.get_submodule(branch.exit)
        self._register(exit, "parallel", module)
        exit_shape = _Shape(branch.layout, branch.stage)
        if before_entry or branch.entry is None:
            source = branch.module.get_submodule(branch.source) if branch.source else branch.module
            keep = _Keep(self._current, exit_shape)
            source.register_forward_pre_hook(keep.before)
        else:
            keep = _Keep(self._current, _Shape(branch.entry_layout, branch.stage))
            branch.module.get_submodule(branch.entry).register_forward_hook(keep.after)
        exit.register_forward_hook(_Beside(module, view, keep, exit_shape, self))

    def add_after_block(self, block: Block, module: nn.Module, view: View = "tokens") -> None:
        """Sequential: the block's output passes through `module`; the next block, gap and head see the result."""
        self._register(block.module, "after", module)
        block.module.register_forward_hook(_After(module, view, _Shape(block.layout, block.stage), self))

    def add_after(self, layer: str, module: nn.Module) -> None:
        """Sequential, behind any layer by its name: y = module(layer(x)), in the layer's own layout."""
        target = self.get_submodule(layer)
        self._register(target, "after", module)
        target.register_forward_hook(_AfterLayer(module))

    def add_beside(self, layer: str, module: nn.Module) -> None:
        """Parallel, beside any layer by its name: y = layer(x) + module(x), in the layer's own layout."""
        target = self.get_submodule(layer)
        self._register(target, "beside", module)
        target.register_forward_hook(_BesideLayer(module))

    def add_prompts(self, prompts: nn.Module, length: int, deep: bool) -> None:
        """Prompt tokens in a ViT: `prompts(block index)` gives [length, C] or [B, length, C].

        They stand behind the prefix tokens and count among them from then on. Shallow: they enter before the first
        block and live on. Deep: the ones of every block replace what the block before made of its own.
        Raises `ValueError` for networks that are not one sequence of tokens.
        """
        if self.layout != "NLC" or len(set(self.strides)) > 1:
            raise ValueError("prompt tokens need a network that is one sequence of tokens")
        if "prompts" in self.added:
            raise ValueError("there are prompt tokens already")
        self.added["prompts"] = prompts
        before = self.prefix_tokens
        for block in self.blocks:
            if block.index == 0 or deep:
                insert = _Prompt(prompts, block.index, before, length if block.index else 0)
                block.module.register_forward_pre_hook(insert)
            for inner in block.module.modules():
                if hasattr(inner, "num_prefix_tokens"):  # tokens that rotary embeddings leave out
                    inner.num_prefix_tokens += length
        self.prefix_tokens += length

    def put_at_output(self, module: nn.Module) -> None:
        """Let `module` turn the list of maps into the list of maps, of the same channels, that the head sees."""
        if "output" in self.added:
            raise ValueError("the place between backbone and head is taken")
        self.added["output"] = module

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
        the first stage. What is not called as a layer (position-bias networks) has no role.
        """
        if unknown := set(roles) - ROLES:
            raise ValueError(f"no role {sorted(unknown)[0]}; roles are {', '.join(sorted(ROLES))}")
        named = ((name, _role(name, module)) for name, module in self._own.items())
        return [name for name, role in named if role is not None and (not roles or role in roles)]

    def roles(self) -> dict[str, str]:
        """Name -> role for all of `layers()`."""
        return {name: role for name, module in self._own.items() if (role := _role(name, module)) is not None}

    def as_map(self, x: Tensor, place: Branch | Block) -> Tensor:
        """[B, C, h, w] of what passes a branch or leaves a block, channels last or in the place's layout; prefix
        tokens are left out. For use during a forward pass."""
        return self._map_of(x, place.stage)

    def from_map(self, feature_map: Tensor, x: Tensor) -> Tensor:
        """The inverse of `as_map`, in the shape of `x`, which prefix tokens are taken from."""
        return _shaped_like(feature_map, x, x[:, : self._prefix(x)] if x.dim() == 3 else None)

    def grid(self, stage: int) -> tuple[int, int]:
        """(h, w) of the stage's maps in the current forward pass."""
        if self._current.size is None:
            raise RuntimeError("the grid is known during a forward pass alone")
        height, width = self._current.size
        return math.ceil(height / self.strides[stage]), math.ceil(width / self.strides[stage])

    def _prefix(self, x: Tensor) -> int:
        """Prefix tokens stand in sequences of a network that is one sequence of tokens."""
        return self.prefix_tokens if x.dim() == 3 else 0

    def _map_of(self, x: Tensor, stage: int) -> Tensor:
        if x.dim() == 4:
            return x.permute(0, 3, 1, 2)
        height, width = self.grid(stage)
        patches = x[:, self._prefix(x) :]
        return patches.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)

    def _register(self, target: nn.Module, place: str, module: nn.Module) -> None:
        path = next((name for name, known in self._own.items() if known is target), None)
        if path is None:
            raise ValueError(f"{type(target).__name__} did not come with {self.name}")
        stem = key = f"{path.replace('.', '_')}_{place}"
        count = 1
        while key in self.added:
            count += 1
            key = f"{stem}_{count}"
        self.added[key] = module


def _channels_last(x: Tensor, layout: Layout) -> Tensor:
    return x.permute(0, 2, 3, 1) if layout == "NCHW" else x


def _native(x: Tensor, layout: Layout) -> Tensor:
    return x.permute(0, 3, 1, 2) if layout == "NCHW" else x


def _shaped_like(feature_map: Tensor, x: Tensor, prefix: Tensor | None) -> Tensor:
    """A map [B, C, h, w] in the channels-last shape of `x`, behind `prefix` tokens where it is a sequence."""
    if x.dim() == 4:
        return feature_map.permute(0, 2, 3, 1)
    patches = feature_map.flatten(2).transpose(1, 2)
    return torch.cat([prefix.to(patches.dtype), patches], dim=1) if prefix is not None else patches


def _apply(module: nn.Module, view: View, x: Tensor, stage: int, attach_points: AttachPoints, add: bool) -> Tensor:
    """`module` on the channels-last `x` in its view. `add`: the result is added, so prefix tokens get zero."""
    if view == "tokens":
        return module(x)
    prefix = x[:, : attach_points._prefix(x)] if attach_points._prefix(x) else None
    if add and prefix is not None:
        prefix = torch.zeros_like(prefix)
    return _shaped_like(module(attach_points._map_of(x, stage)), x, prefix)


@dataclass(eq=False)
class _After:
    module: nn.Module
    view: View
    shape: _Shape
    attach_points: AttachPoints

    def __call__(self, target: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        x = _channels_last(output, self.shape.layout)
        y = _apply(self.module, self.view, x, self.shape.stage, self.attach_points, add=False)
        return _native(y, self.shape.layout)


class _Keep:
    """Holds a branch's input until its exit. The two meet within one call of a block, checkpointed or not."""

    def __init__(self, current: _Current, shape: _Shape):
        self.current = current
        self.shape = shape

    def before(self, target: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.current.kept[id(self)] = inputs[0]

    def after(self, target: nn.Module, inputs: Any, output: Tensor) -> None:
        self.current.kept[id(self)] = output

    def take(self) -> Tensor:
        return _channels_last(self.current.kept.pop(id(self)), self.shape.layout)


@dataclass(eq=False)
class _Beside:
    module: nn.Module
    view: View
    keep: _Keep
    shape: _Shape
    attach_points: AttachPoints

    def __call__(self, target: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        y = _apply(self.module, self.view, self.keep.take(), self.shape.stage, self.attach_points, add=True)
        return output + _native(y, self.shape.layout)


@dataclass(eq=False)
class _AfterLayer:
    module: nn.Module

    def __call__(self, target: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self.module(output)


@dataclass(eq=False)
class _BesideLayer:
    module: nn.Module

    def __call__(self, target: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.module(inputs[0])


@dataclass(eq=False)
class _Prompt:
    prompts: nn.Module
    block: int
    start: int
    replaced: int

    def __call__(self, target: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = inputs
        prompt = self.prompts(self.block).expand(x.shape[0], -1, -1).to(x.dtype)
        return (torch.cat([x[:, : self.start], prompt, x[:, self.start + self.replaced :]], dim=1), *rest)


def _blocks_in(container: nn.Module) -> Iterator[nn.Module]:
    for child in container.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _blocks_in(child)
        else:
            yield child


def _out_channels(block: nn.Module) -> int:
    named = ((name.split("."), module) for name, module in block.named_modules())
    return [module for path, module in named if hasattr(module, "out_channels") and "se" not in path][-1].out_channels


def _branch(kind: Kind, source: str, entry: str | None, exit: str, layout: Layout, at_entry: Layout | None = None):
    return {
        "kind": kind,
        "source": source,
        "entry": entry,
        "exit": exit,
        "layout": layout,
        "entry_layout": at_entry or layout,
    }


def _pre_norm(block: nn.Module, attention: Layout = "NLC") -> list[dict[str, Any]]:
    return [
        _branch("attention", "norm1", "norm1", "drop_path1", attention),
        _branch("mlp", "norm2", "norm2", "drop_path2", "NLC"),
    ]


def _post_norm(block: nn.Module, attention: Layout = "NLC") -> list[dict[str, Any]]:
    return [
        _branch("attention", "", None, "drop_path1", attention),
        _branch("mlp", "mlp", None, "drop_path2", "NLC"),
    ]


def _joint(block: nn.Module) -> list[dict[str, Any]]:
    return [_branch("joint", "in_norm", "in_norm", "drop_path", "NLC")]


def _parallel_things(block: nn.Module) -> list[dict[str, Any]]:
    return [
        _branch(kind, f"{group}.{i}.norm", f"{group}.{i}.norm", f"{group}.{i}.drop_path", "NLC")
        for kind, group in (("attention", "attns"), ("mlp", "ffns"))
        for i in range(len(getattr(block, group)))
    ]


def _convnext(block: nn.Module) -> list[dict[str, Any]]:
    return [_branch("conv", "", "norm", "drop_path", "NCHW", "NCHW" if block.use_conv_mlp else "NHWC")]


def _metaformer(block: nn.Module) -> list[dict[str, Any]]:
    layout: Layout = "NCHW" if isinstance(block.mlp.fc1, nn.Conv2d) else "NLC"
    mixer: Kind = "attention" if hasattr(block.token_mixer, "qkv") else "conv"
    return [
        _branch(mixer, "norm1", "norm1", "layer_scale1", layout),
        _branch("mlp", "norm2", "norm2", "layer_scale2", layout),
    ]


_BRANCHES: dict[str, Callable[[nn.Module], Sequence[dict[str, Any]]]] = {
    "vision_transformer.Block": _pre_norm,
    "vision_transformer.ResPostBlock": _post_norm,
    "vision_transformer.ParallelScalingBlock": _joint,
    "vision_transformer.DiffParallelScalingBlock": _joint,
    "vision_transformer.ParallelThingsBlock": _parallel_things,
    "eva.EvaBlock": _pre_norm,
    "eva.EvaBlockPostNorm": _post_norm,
    "pvt_v2.Block": _pre_norm,
    "swin_transformer.SwinTransformerBlock": lambda block: _pre_norm(block, "NHWC"),
    "swin_transformer_v2.SwinTransformerV2Block": lambda block: _post_norm(block, "NHWC"),
    "convnext.ConvNeXtBlock": _convnext,
    "metaformer.MetaFormerBlock": _metaformer,
}
"""What the branches of a block are, by timm's module and class."""


def _branches_of(block: nn.Module) -> Sequence[dict[str, Any]]:
    kind = type(block)
    find = _BRANCHES.get(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
    return find(block) if find else []


def _block_layout(block: nn.Module, otherwise: Layout) -> Layout:
    """Of a block's output: its last branch's, but for Swin, which gives its map back its shape."""
    branches = _branches_of(block)
    return branches[-1]["layout"] if branches and otherwise == "NCHW" else otherwise


_LEAVES = {
    "qkv": "qkv",
    "q": "q",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "kv": "kv",
    "in_proj": "joint_in",
    "out_proj": "joint_out",
    "attn_out_proj": "proj",
    "mlp_out_proj": "fc2",
    "reduction": "merge",
}
_MOBILE_ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "proj"}
ROLES = frozenset({*_LEAVES.values(), "gate", "fc1", "conv", "grouped", "se", "stem"})


def _role(name: str, module: nn.Module) -> str | None:
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return None
    if not name.startswith("stages."):
        return "stem"
    *path, leaf = name.split(".")
    if leaf in _LEAVES:
        return _LEAVES[leaf]
    if leaf == "proj" and path[-1] in _MOBILE_ATTENTION:
        return _MOBILE_ATTENTION[path[-1]]
    if "mlp" in path and leaf in ("fc1", "fc1_x", "fc1_g", "fc2"):
        return {"fc1_x": "fc1", "fc1_g": "gate"}.get(leaf, leaf)
    if isinstance(module, nn.Linear):
        return "proj" if leaf == "proj" else None
    if "se" in path or leaf in ("fc1", "fc2", "fc_reduce", "fc_select"):
        return "se"
    if path[2:3] == ["downsample"]:  # of the stage; a ResNet has its own inside blocks
        return "merge"
    return "conv" if module.groups == 1 else "grouped"
