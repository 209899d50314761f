"""Every family has maps at any image size, computes what timm computes, and stays frozen."""

from __future__ import annotations

import pytest
import timm
import torch

from harness.errors import UserError
from harness.models.backbones.families import (
    backbone_names,
    check_backbone,
    create,
    cut,
    families,
    register,
    tiny_networks,
)
from harness.models.backbones.family import Family, TinyNetwork
from tests.support.tiny_networks import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_have_the_stated_channels_and_strides_at_any_size(pristine, name):
    backbone = pristine(name)
    assert backbone.strides == FAMILIES[name]
    coarsest = max(backbone.strides)
    for height, width in ((64, 96), (50, 75), (1, 33)):
        maps = backbone(torch.randn(2, 3, height, width))
        rows, columns = (-(-side // coarsest) * coarsest for side in (height, width))
        expected = [(2, c, rows // s, columns // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)]
        assert [tuple(m.shape) for m in maps] == expected
        assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_are_timms_own_intermediates(name):
    torch.manual_seed(0)
    network = create(name).eval()
    flat = len(set(FAMILIES[name])) == 1
    images = torch.randn(1, 3, *((56, 70) if FAMILIES[name][0] == 14 else (64, 96)))
    depth = len(network.blocks) if flat else 4
    indices = [round(depth * k / 4) - 1 for k in range(1, 5)] if flat else 4
    with torch.no_grad():
        if name.startswith(("tf_efficientnet", "mobilenet")):
            extractor = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1)).eval()
            extractor.load_state_dict(network.state_dict(), strict=False)
            expected = extractor(images)
        else:
            expected = network.forward_intermediates(images, indices=indices, norm=flat, intermediates_only=True)
        for ours, theirs in zip(cut(name, network)(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_backbone_builds_no_graph_and_changes_no_bit(pristine, name):
    backbone = pristine(name)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    maps = backbone.train()(torch.randn(2, 3, 64, 64))
    assert not any(m.requires_grad for m in maps)
    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_a_gradient(pristine, name):
    backbone = pristine(name)
    backbone.unfreeze(*backbone.parameters())
    torch.manual_seed(0)
    sum((m * torch.randn_like(m)).sum() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_rotary_embedding_of_each_block_is_its_own():
    name = "vit_small_patch16_rope_mixed_224"
    torch.manual_seed(0)
    network = create(name).eval()
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected = network.forward_intermediates(images, indices=[2, 5, 8, 11], norm=True, intermediates_only=True)
        for ours, theirs in zip(cut(name, network)(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_anti_aliasing_pooling_keeps_the_border():
    for name in ("resnetaa34d", "mobilenetv4_conv_aa_medium"):
        with torch.device("meta"):
            maps = cut(name, create(name))(torch.empty(1, 3, 50, 75))
        assert [tuple(m.shape[-2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_unlisted_backbone_is_refused_with_the_nearest_name():
    for name in families():
        check_backbone(backbone_names(name)[0])
    with pytest.raises(UserError, match="its family is not supported"):
        check_backbone("crossvit_9_240")
    with pytest.raises(UserError, match="convnext_tiny"):
        check_backbone("convnext_tinny")


def test_family_of_a_taken_timm_module_is_refused():
    class Other(Family):
        modules = {"resnet": TinyNetwork("resnet10t")}

        def cut(self, network):
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"the family of timm\.models\.resnet is already registered"):
        register(Other)


def test_tiny_network_belongs_to_its_family_and_is_small():
    for module, tiny in tiny_networks().items():
        assert tiny.name in backbone_names(module)
        with torch.device("meta"):
            network = create(tiny.name, **tiny.changes)
        assert sum(parameter.numel() for parameter in network.parameters()) < 3e7
