"""Attach points: blocks, branches, layers, prompts, output, without a method knowing a family."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from harness.models.network import Segmenter
from methods.linear import Linear
from tests.support.probes import Probe, Prompts, images, pick, same
from tests.support.tiny_networks import FAMILIES

CNNS = [name for name in FAMILIES if name.startswith(("res", "sk", "regnet", "tf_eff", "mobilenet"))]
BRANCHED = [name for name in FAMILIES if name not in CNNS]
PLAIN = [name for name, strides in FAMILIES.items() if len(set(strides)) == 1]
VIEWS = ["tokens", "map"]


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_run_in_order_with_the_stated_channels(pristine, name):
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
def test_convolutional_networks_have_layers_but_no_branches(pristine, name):
    backbone = pristine(name)
    assert backbone.branches == []
    assert backbone.layers("conv")


@pytest.mark.parametrize("name", BRANCHED)
def test_identity_modules_change_no_bit(pristine, name):
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
def test_attached_module_sees_the_stated_channels_and_grid(pristine, name):
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
            grid = tuple(side // backbone.strides[branch.stage] for side in backbone.canvas((height, width)))
            if view == "map":
                assert probe.seen == (2, branch.channels, *grid)
            else:
                cells = torch.Size(probe.seen[1:-1]).numel()
                assert probe.seen[-1] == branch.channels
                assert cells == grid[0] * grid[1] + backbone.prefix_tokens


@pytest.mark.parametrize("name", BRANCHED)
def test_zero_at_the_exit_disables_the_branch(pristine, name):
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
def test_parallel_module_gets_the_branch_input_and_is_added(pristine, name):
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
def test_parallel_module_after_the_entry_gets_the_norms_output(pristine, name):
    backbone = pristine(name)
    branch = backbone.branches[-1]
    normed = Probe(0.0)
    backbone.add_to_branch(branch, normed, before_entry=False)
    seen = {}
    branch.module.get_submodule(branch.entry).register_forward_hook(lambda m, i, o: seen.update(y=o))
    backbone(images())
    expected = seen["y"].permute(0, 2, 3, 1) if branch.entry_layout == "NCHW" else seen["y"]
    assert torch.equal(normed.input, expected)


def test_post_norm_blocks_have_no_entry(pristine):
    backbone = pristine("swinv2_tiny_window8_256")
    assert all(branch.entry is None for branch in backbone.branches)
    with pytest.raises(ValueError, match="the attention of block 0 has no norm at its entry"):
        backbone.insert_at_entry(backbone.branches[0], Probe())


@pytest.mark.parametrize("name", BRANCHED)
def test_maps_leave_prefix_tokens_out_and_restore_them(pristine, name):
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


def test_map_view_does_not_change_prefix_tokens(pristine):
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
def test_only_attached_modules_are_trained_and_stored(pristine, name):
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
def test_every_layer_with_a_role_is_called(pristine, name):
    """Scaling the output of a layer of each role changes the maps."""
    backbone = pristine(name)
    plain = backbone(images())
    for role in sorted(set(backbone.roles().values())):
        changed = copy.deepcopy(backbone)
        changed.insert_after(changed.layers(role)[0], Probe(1.0))
        assert same(plain, changed(images()))
        changed.insert_after(changed.layers(role)[0], Probe(-2.0))
        assert not same(plain, changed(images())), role


def test_module_parallel_to_a_layer_gets_its_input(pristine):
    backbone = pristine("resnet10t")
    layer = backbone.layers("conv")[0]
    beside = copy.deepcopy(backbone.get_submodule(layer))
    backbone.add_to_layer(layer, beside)
    seen = {}
    module = backbone.get_submodule(layer)
    module.register_forward_hook(lambda m, inputs, o: seen.update(x=inputs[0], y=o))
    backbone(images())
    torch.testing.assert_close(seen["y"], 2 * beside(seen["x"]))


def test_module_parallel_to_several_layers_gets_the_input_of_the_first(pristine):
    backbone = pristine("resnet10t")
    seen, probe = {}, Probe(0.5)
    plain = backbone.get_submodule("stages.0.0.act1")
    plain.register_forward_hook(lambda m, inputs, output: seen.update(plain=output.clone()))
    backbone.add_to_layer("stages.0.0.bn1", probe, through="stages.0.0.act1")
    plain.register_forward_hook(lambda m, inputs, output: seen.update(y=output))
    other = copy.deepcopy(backbone)
    backbone(images())
    assert torch.equal(seen["y"], seen["plain"] + 0.5 * probe.input)
    backbone.remove(probe)
    backbone(images())
    assert torch.equal(seen["y"], seen["plain"])
    with torch.no_grad():
        next(iter(other.added.values())).scale.fill_(2.0)  # the copy has a module of its own
    assert probe.scale == 0.5


def test_block_channels_are_those_of_the_map_where_convolutions_are_split(pristine):
    backbone = pristine("tf_mixnet_s")
    seen = []
    for block in backbone.blocks:
        block.module.register_forward_hook(lambda m, inputs, output: seen.append(output.shape[1]))
    backbone(images())
    assert seen == [block.channels for block in backbone.blocks]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", {"stem": 1, "qkv": 12, "proj": 12, "fc1": 12, "fc2": 12}),
        ("swinv2_tiny_window8_256", {"stem": 1, "qkv": 12, "proj": 12, "fc1": 12, "fc2": 12, "merge": 3}),
        ("pvt_v2_b0", {"stem": 1, "q": 8, "kv": 8, "proj": 8, "conv": 6, "grouped": 8, "fc1": 8, "fc2": 8, "merge": 3}),
        ("convnext_atto", {"stem": 1, "grouped": 12, "fc1": 12, "fc2": 12, "merge": 3}),
    ],
)
def test_layers_have_the_expected_roles(pristine, name, expected):
    backbone = pristine(name)
    assert {role: len(backbone.layers(role)) for role in set(backbone.roles().values())} == expected
    with pytest.raises(ValueError, match="no role key"):
        backbone.layers("key")


@pytest.mark.parametrize("name", FAMILIES)
def test_all_affine_norms_are_found(pristine, name):
    backbone = pristine(name)
    found = {id(p) for norm in backbone.norms().values() for p in norm.parameters(recurse=False)}
    kinds = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)
    known = [p for m in backbone.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)]
    assert known and {id(p) for p in known} <= found


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("deep", [False, True])
def test_prompts_follow_the_prefix_tokens_and_are_in_no_map(pristine, name, deep):
    backbone = pristine(name)
    plain, prefix = backbone(images()), backbone.prefix_tokens
    prompts = Prompts(backbone.channels[0], depth=12 if deep else 1)
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


def test_prompts_need_one_sequence_of_tokens(pristine):
    with pytest.raises(ValueError, match="one sequence of tokens"):
        pristine("pvt_v2_b0").insert_prompts(nn.Identity(), 3, deep=True)


def test_output_module_transforms_the_maps_and_is_the_only_one(pristine):
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
def test_checkpointed_stages_give_the_same_gradients(pristine, name, reentrant):
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
