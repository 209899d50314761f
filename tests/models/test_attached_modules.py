"""What attached modules keep to themselves: copies, removals, modules on the stream and with a shared input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support.probes import Probe, Prompts, images, same
from tests.support.tiny_networks import FAMILIES

CNNS = [name for name in FAMILIES if name.startswith(("res", "sk", "regnet", "tf_eff", "mobilenet"))]
BRANCHED = [name for name in FAMILIES if name not in CNNS]
PLAIN = [name for name, strides in FAMILIES.items() if len(set(strides)) == 1]
VIEWS = ["tokens", "map"]


def test_copied_backbone_has_its_own_modules(pristine):
    backbone = pristine("vit_tiny_patch16_224")
    backbone.add_to_branch(backbone.branches[0], Probe(0.0))
    backbone.insert_at_exit(backbone.branches[0], Probe(1.0))
    plain = backbone(images())
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in other.added.parameters():
            parameter.fill_(2.0)
    assert same(plain, backbone(images())) and not same(plain, other(images()))


def attach_everywhere(backbone):
    """A module at every kind of place; with their probes they change the maps."""
    branch, block = backbone.branches[0], backbone.blocks[-1]
    layer = backbone.layers("proj")[0]
    probes = [Probe(2.0) for _ in range(11)]
    backbone.insert_at_entry(branch, probes[0])
    backbone.insert_at_exit(branch, probes[1])
    backbone.insert_after_block(block, probes[2], view="map")
    backbone.insert_after_stage(0, probes[3])
    backbone.insert_after(layer, probes[4])
    backbone.insert_before([layer], probes[5])
    backbone.insert_at_output(nn.Identity())
    backbone.add_to_branch(branch, probes[6])
    backbone.add_to_branch(branch, probes[7], before_entry=False)
    backbone.add_to_layer(layer, probes[8])
    backbone.add_to_stream(branch, probes[9])
    backbone.add_to_stream(block, probes[10])
    return [*probes, backbone.added["output"]]


@pytest.mark.parametrize("copied", [False, True])
def test_removed_modules_leave_no_trace(pristine, copied):
    backbone = pristine("vit_tiny_patch16_224")
    plain = backbone(images())
    modules = attach_everywhere(backbone)
    if copied:
        backbone, modules = copy.deepcopy((backbone, modules))
    assert not same(plain, backbone(images()))
    for module in modules:
        backbone.remove(module)
    assert same(plain, backbone(images()))
    assert len(backbone.added) == len(backbone.gaps) == 0
    assert backbone.count_frozen_stages() == len(backbone.stages)
    with pytest.raises(ValueError, match="this Probe is not attached to vit_tiny_patch16_224"):
        backbone.remove(modules[0])


def test_stream_module_applies_after_a_branch_and_a_block(pristine):
    backbone = pristine("vit_tiny_patch16_224")
    block = backbone.blocks[0]
    after_the_branch, after_the_block = Probe(0.5), Probe(0.25)
    backbone.add_to_stream(backbone.branches[0], after_the_branch)
    backbone.add_to_stream(block, after_the_block)
    seen = {}
    block.module.register_forward_hook(lambda m, inputs, o: seen.update(x=inputs[0], y=o))
    backbone(images())
    own = pristine("vit_tiny_patch16_224").blocks[0].module
    x = 1.5 * (seen["x"] + own.ls1(own.attn(own.norm1(seen["x"]))))
    torch.testing.assert_close(seen["y"], 1.25 * (x + own.ls2(own.mlp(own.norm2(x)))))


def test_layers_with_a_shared_input_share_the_module(pristine):
    backbone = pristine("pvt_v2_b0")
    module = Probe(2.0)
    backbone.insert_before(["stages.0.blocks.0.attn.q", "stages.0.blocks.0.attn.sr"], module)
    seen = []
    layer = backbone.get_submodule("stages.0.blocks.0.attn.sr")
    backbone.get_submodule("stages.0.blocks.0.attn.q").register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    layer.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    backbone(images())
    tokens, feature_map = seen
    torch.testing.assert_close(tokens, feature_map.flatten(2).transpose(1, 2))
    assert list(backbone.added) == ["stages_0_blocks_0_attn_q_before"]


@pytest.mark.parametrize(
    ("old", "arguments"),
    [
        ("put_in_gap", lambda b: (0, Probe())),
        ("put_at_output", lambda b: (nn.Identity(),)),
        ("add_at_entry", lambda b: (b.branches[0], Probe())),
        ("add_at_exit", lambda b: (b.branches[0], Probe(), "map")),
        ("add_parallel", lambda b: (b.branches[0], Probe(0.0), False, "map")),
        ("add_after_block", lambda b: (b.blocks[0], Probe())),
        ("add_after", lambda b: (b.layers("proj")[0], Probe())),
        ("add_beside", lambda b: (b.layers("proj")[0], Probe(0.0))),
        ("add_prompts", lambda b: (Prompts(b.channels[0]), 3, False)),
    ],
)
def test_old_names_of_the_attach_methods_work_with_a_warning(pristine, old, arguments):
    backbone = pristine("vit_tiny_patch16_224")
    plain = backbone(images())
    with pytest.warns(DeprecationWarning, match=f"StagedBackbone.{old} is now (insert|add)_"):
        getattr(backbone, old)(*arguments(backbone))
    assert len(backbone.added) + len(backbone.gaps) == 1
    assert same(plain, backbone(images())) == (old != "add_prompts")
