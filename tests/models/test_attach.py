"""Where methods stand: blocks, branches, layers, prompts, output; a method never needs to know a family."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from harness.models.network import Segmenter
from methods.linear import Linear
from tests.support.tiny_networks import FAMILIES

CNNS = [name for name in FAMILIES if name.startswith(("res", "sk", "regnet", "tf_eff", "mobilenet"))]
BRANCHED = [name for name in FAMILIES if name not in CNNS]
PLAIN = [name for name, strides in FAMILIES.items() if len(set(strides)) == 1]
VIEWS = ["tokens", "map"]


class Probe(nn.Module):
    """scale·x, and what it saw."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        self.seen = tuple(x.shape)
        self.input = x.detach()
        return self.scale * x


def images(height=64, width=96):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def pick(backbone):
    """The first and the last branch of each kind."""
    kinds = {branch.kind for branch in backbone.branches}
    return [found[i] for kind in kinds for found in [[b for b in backbone.branches if b.kind == kind]] for i in (0, -1)]


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_run_in_the_stated_order_and_put_out_the_stated_channels(pristine, name):
    backbone = pristine(name)
    calls = []
    for block in backbone.blocks:
        block.module.register_forward_hook(lambda m, i, o, block=block: calls.append((block, tuple(o.shape))))
    backbone(images())
    assert [block.index for block, _ in calls] == list(range(len(backbone.blocks))) and len(calls) >= 4
    for block, shape in calls:
        assert shape[1 if block.layout == "NCHW" else -1] == block.channels
        assert len(shape) == (3 if block.layout == "NLC" else 4)
    assert [block.stage for block in backbone.blocks] == sorted(block.stage for block in backbone.blocks)


@pytest.mark.parametrize("name", CNNS)
def test_convolutional_networks_have_layers_and_no_branches(pristine, name):
    backbone = pristine(name)
    assert backbone.branches == []
    assert backbone.layers("conv")


@pytest.mark.parametrize("name", BRANCHED)
def test_modules_that_change_nothing_leave_every_bit(pristine, name):
    backbone = pristine(name)
    plain = backbone(images(50, 75))
    for branch in pick(backbone):
        for view in VIEWS:
            backbone.insert_at_exit(branch, Probe(), view)
            if branch.entry:
                backbone.insert_at_entry(branch, Probe(), view)
            backbone.add_to_branch(branch, Probe(0.0), view)
            backbone.add_to_branch(branch, Probe(0.0), view, before_entry=False)
    for block in (backbone.blocks[0], backbone.blocks[-1]):
        for view in VIEWS:
            backbone.insert_after_block(block, Probe(), view)
    assert same(plain, backbone(images(50, 75)))


@pytest.mark.parametrize("name", BRANCHED)
def test_an_added_module_sees_the_stated_channels_and_the_grid_of_the_image(pristine, name):
    backbone = pristine(name)
    probes = []
    for branch in pick(backbone):
        for view in VIEWS:
            for add in (
                backbone.insert_at_exit,
                backbone.add_to_branch,
                partial(backbone.add_to_branch, before_entry=False),
                *([backbone.insert_at_entry] if branch.entry else []),
            ):
                probes.append((branch, view, Probe(0.5)))
                add(branch, probes[-1][2], view)
    for height, width in ((64, 96), (50, 75)):
        backbone(images(height, width))
        for branch, view, probe in probes:
            stride = backbone.strides[branch.stage]
            grid = (-(-height // stride), -(-width // stride))
            if view == "map":
                assert probe.seen == (2, branch.channels, *grid)
            else:
                cells = torch.Size(probe.seen[1:-1]).numel()
                assert probe.seen[-1] == branch.channels
                assert cells == grid[0] * grid[1] + backbone.prefix_tokens


@pytest.mark.parametrize("name", BRANCHED)
def test_a_zero_at_the_exit_removes_the_branch(pristine, name):
    backbone = pristine(name)
    by_block: dict[int, list] = {}
    for branch in backbone.branches:
        by_block.setdefault(branch.block, []).append(branch)
    for branch in by_block[1]:
        backbone.insert_at_exit(branch, Probe(0.0))
    seen = {}
    backbone.branches[0].module.register_forward_hook(lambda m, i, o: seen.update(before=o))
    by_block[1][0].module.register_forward_hook(lambda m, i, o: seen.update(after=o))
    backbone(images())
    torch.testing.assert_close(seen["before"], seen["after"])


@pytest.mark.parametrize("name", BRANCHED)
def test_a_parallel_module_gets_the_branchs_input_and_its_result_is_added(pristine, name):
    backbone = pristine(name)
    first = next(branch for branch in backbone.branches if branch.block == 1)
    last = [branch for branch in backbone.branches if branch.block == 1][-1]
    for branch in {first, last}:
        backbone.insert_at_exit(branch, Probe(0.0))
    parallel = Probe(1.0)
    backbone.add_to_branch(first, parallel)
    seen = {}
    first.module.register_forward_hook(lambda m, inputs, o: seen.update(x=inputs[0], y=o))
    backbone(images())
    torch.testing.assert_close(seen["y"], 2 * seen["x"])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_what_enters_past_the_norm_is_what_the_norm_puts_out(pristine, name):
    backbone = pristine(name)
    branch = backbone.branches[-1]
    normed = Probe(0.0)
    backbone.add_to_branch(branch, normed, before_entry=False)
    seen = {}
    branch.module.get_submodule(branch.entry).register_forward_hook(lambda m, i, o: seen.update(y=o))
    backbone(images())
    expected = seen["y"].permute(0, 2, 3, 1) if branch.entry_layout == "NCHW" else seen["y"]
    assert torch.equal(normed.input, expected)


def test_post_norm_blocks_have_no_entry_and_say_so(pristine):
    backbone = pristine("swinv2_tiny_window8_256")
    assert all(branch.entry is None for branch in backbone.branches)
    with pytest.raises(ValueError, match="the attention of block 0 has no norm at its entry"):
        backbone.insert_at_entry(backbone.branches[0], Probe())


@pytest.mark.parametrize("name", BRANCHED)
def test_prefix_tokens_are_no_part_of_a_map_and_come_back(pristine, name):
    backbone = pristine(name)
    branch = backbone.branches[-1]

    class RoundTrip(nn.Module):
        def forward(self, x):
            feature_map = backbone.as_map(x, branch)
            assert feature_map.shape[-2:] == backbone.grid(branch.stage)
            self.equal = torch.equal(backbone.from_map(feature_map, x), x)
            return x

    backbone.insert_at_exit(branch, RoundTrip())
    backbone(images(50, 75))
    assert backbone.added[next(iter(backbone.added))].equal


def test_a_parallel_map_adds_nothing_to_prefix_tokens_and_a_sequential_one_passes_them(pristine):
    backbone = pristine("deit_tiny_distilled_patch16_224")
    branch = backbone.branches[-1]
    outputs = []
    branch.module.register_forward_hook(lambda m, i, o: outputs.append(o))
    backbone(images())
    backbone.add_to_branch(branch, Probe(3.0), view="map")
    backbone.insert_at_exit(branch, Probe(3.0), view="map")
    backbone(images())
    assert torch.equal(outputs[0][:, :2], outputs[1][:, :2])
    assert not torch.equal(outputs[0][:, 2:], outputs[1][:, 2:])


@pytest.mark.parametrize("name", FAMILIES)
def test_added_modules_alone_are_trained_and_stored_and_the_networks_names_stay(pristine, name):
    backbone = pristine(name)
    names = set(backbone.state_dict())
    for branch in backbone.branches[:2]:
        backbone.insert_at_exit(branch, Probe())
        backbone.add_to_branch(branch, Probe())
    backbone.insert_after_block(backbone.blocks[-1], Probe())
    layer = backbone.layers("conv", "fc1")[0]
    backbone.insert_after(layer, Probe())
    state = Segmenter(backbone, nn.Identity(), Linear(Linear.Hyperparameters())).trained_state()
    assert set(backbone.state_dict()) - names == {key.removeprefix("backbone.") for key in state}
    assert len(state) == len(backbone.added) and all(key.startswith("backbone.added.") for key in state)
    sum(m.sum() for m in backbone.train()(images())).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_behind_or_beside_a_layer_acts_on_what_the_layer_computes(pristine, name):
    """Every layer with a role is really called: doubling and doubling again is seen in the maps."""
    backbone = pristine(name)
    plain = backbone(images())
    for role in sorted(set(backbone.roles().values())):
        changed = copy.deepcopy(backbone)
        changed.insert_after(changed.layers(role)[0], Probe(1.0))
        assert same(plain, changed(images()))
        changed.insert_after(changed.layers(role)[0], Probe(-2.0))
        assert not same(plain, changed(images())), role


def test_a_layers_own_input_reaches_the_module_beside_it(pristine):
    backbone = pristine("resnet10t")
    layer = backbone.layers("conv")[0]
    beside = copy.deepcopy(backbone.get_submodule(layer))
    backbone.add_to_layer(layer, beside)
    seen = {}
    module = backbone.get_submodule(layer)
    module.register_forward_hook(lambda m, inputs, o: seen.update(x=inputs[0], y=o))
    backbone(images())
    torch.testing.assert_close(seen["y"], 2 * beside(seen["x"]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", {"stem": 1, "qkv": 12, "proj": 12, "fc1": 12, "fc2": 12}),
        ("swinv2_tiny_window8_256", {"stem": 1, "qkv": 12, "proj": 12, "fc1": 12, "fc2": 12, "merge": 3}),
        ("pvt_v2_b0", {"stem": 1, "q": 8, "kv": 8, "proj": 8, "conv": 6, "grouped": 8, "fc1": 8, "fc2": 8, "merge": 3}),
        ("convnext_atto", {"stem": 1, "grouped": 12, "fc1": 12, "fc2": 12, "merge": 3}),
    ],
)
def test_layers_have_honest_roles(pristine, name, expected):
    backbone = pristine(name)
    assert {role: len(backbone.layers(role)) for role in set(backbone.roles().values())} == expected
    with pytest.raises(ValueError, match="no role key"):
        backbone.layers("key")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_affine_normalisation_is_found(pristine, name):
    backbone = pristine(name)
    found = {id(p) for norm in backbone.norms().values() for p in norm.parameters(recurse=False)}
    kinds = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)
    known = [p for m in backbone.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)]
    assert known and {id(p) for p in known} <= found


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("deep", [False, True])
def test_prompts_stand_behind_the_prefix_tokens_and_never_in_a_map(pristine, name, deep):
    class Prompts(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.tokens = nn.Parameter(torch.randn(12 if deep else 1, 3, width))

        def forward(self, block):
            return self.tokens[block]

    backbone = pristine(name)
    plain, prefix = backbone(images()), backbone.prefix_tokens
    prompts = Prompts(backbone.channels[0])
    entered = []
    for block in backbone.blocks:
        block.module.norm1.register_forward_pre_hook(lambda m, inputs: entered.append(inputs[0]))
    backbone.insert_prompts(prompts, length=3, deep=deep)
    maps = backbone(images())
    assert [m.shape for m in maps] == [m.shape for m in plain] and not same(maps, plain)
    lengths = {x.shape[1] for x in entered}
    assert len(lengths) == 1
    for block in range(len(backbone.blocks) if deep else 1):
        assert torch.equal(entered[block][0, prefix : prefix + 3], prompts.tokens[block])
    sum(m.sum() for m in maps).backward()
    assert (prompts.tokens.grad.abs().sum((1, 2)) > 0).all()


def test_prompts_are_refused_where_the_network_is_not_one_sequence(pristine):
    with pytest.raises(ValueError, match="one sequence of tokens"):
        pristine("pvt_v2_b0").insert_prompts(nn.Identity(), 3, deep=True)


def test_the_output_place_turns_maps_into_maps_and_holds_one_module(pristine):
    class Halve(nn.Module):
        def forward(self, maps):
            return [m / 2 for m in maps]

    backbone = pristine("resnet10t")
    plain = backbone(images())
    backbone.insert_at_output(Halve())
    assert same(backbone(images()), [m / 2 for m in plain])
    with pytest.raises(ValueError, match="already"):
        backbone.insert_at_output(Halve())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "pvt_v2_b0"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing_of_stages(pristine, name, reentrant):
    def gradients(checkpointed: bool):
        backbone = pristine(name)
        torch.manual_seed(0)
        module = nn.Conv2d(backbone.branches[2].channels, backbone.branches[2].channels, 3, padding=1)
        backbone.add_to_branch(backbone.branches[2], module, view="map")
        backbone.insert_at_exit(backbone.branches[-1], Probe(), view="map")
        if checkpointed:
            for stage in backbone.stages:
                run = stage.forward
                stage.forward = lambda x, run=run: checkpoint(
                    run, x.requires_grad_() if x.is_leaf else x, use_reentrant=reentrant
                )
        sum(m.square().mean() for m in backbone(images(50, 75))).backward()
        return [parameter.grad for parameter in backbone.added.parameters()]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_copy_has_its_own_modules(pristine):
    backbone = pristine("vit_tiny_patch16_224")
    backbone.add_to_branch(backbone.branches[0], Probe(0.0))
    backbone.insert_at_exit(backbone.branches[0], Probe(1.0))
    plain = backbone(images())
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in other.added.parameters():
            parameter.fill_(2.0)
    assert same(plain, backbone(images())) and not same(plain, other(images()))
