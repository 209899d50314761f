"""A backbone cut into stages computes what timm's network computes, and what is frozen stays so to the bit."""

import pytest
import timm
import torch
from torch import nn

from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.families import create, cut
from harness.models.backbones.weights import Weights, load_backbone

TINY = {
    "resnet10t": (4, 8, 16, 32),
    "resnet26d": (4, 8, 16, 32),
    "tf_efficientnet_lite0": (4, 8, 16, 32),
    "mobilenetv2_035": (4, 8, 16, 32),
    "mobilenetv3_small_050": (4, 8, 16, 32),
    "vit_tiny_patch16_224": (16, 16, 16, 16),
    "deit_tiny_distilled_patch16_224": (16, 16, 16, 16),
    "vit_small_patch14_reg4_dinov2": (14, 14, 14, 14),
}


@pytest.fixture(scope="module", params=TINY)
def backbone(request) -> StagedBackbone:
    return load_backbone(request.param, Weights("random", "random"), seed=0)


def test_maps_have_the_stated_channels_and_strides_at_any_size(backbone):
    assert backbone.strides == TINY[backbone.name]
    for height, width in ((64, 96), (50, 75)):
        maps = backbone(torch.randn(2, 3, height, width))
        expected = [
            (2, c, -(-height // s), -(-width // s)) for c, s in zip(backbone.channels, backbone.strides, strict=True)
        ]
        assert [tuple(m.shape) for m in maps] == expected


def test_the_last_map_of_a_cnn_is_that_of_timms_own_feature_extractor():
    torch.manual_seed(0)
    for name in ("resnet10t", "tf_efficientnet_lite0", "mobilenetv3_small_050"):
        network = create(name).eval()
        reference = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1)).eval()
        reference.load_state_dict(network.state_dict(), strict=False)
        image = torch.randn(1, 3, 64, 64)
        expected = reference(image)
        for ours, theirs in zip(cut(name, network)(image), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_maps_of_a_vit_are_timms_normalised_intermediate_layers():
    torch.manual_seed(0)
    network = create("vit_tiny_patch16_224").eval()
    image = torch.randn(1, 3, 64, 80)
    expected = network.forward_intermediates(image, indices=[2, 5, 8, 11], norm=True, intermediates_only=True)
    for ours, theirs in zip(cut("vit_tiny_patch16_224", network)(image), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_frozen_backbone_builds_no_graph_and_keeps_every_bit_in_training_mode(backbone):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.train()
    maps = backbone(torch.randn(2, 3, 64, 64))
    assert not any(m.requires_grad for m in maps)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    backbone.eval()


def test_batch_norm_statistics_move_only_where_they_were_unfrozen():
    backbone = load_backbone("resnet10t", Weights("random", "random"), seed=0)
    backbone.unfreeze(backbone.stages[3])
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.train()(torch.randn(4, 3, 64, 64))
    moved = {name for name, tensor in backbone.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved and all(name.startswith("stages.3.") for name in moved)
    assert backbone.stages[3].training and not backbone.stages[2].training


def test_unfreezing_a_parameter_leaves_its_modules_statistics_frozen():
    backbone = load_backbone("resnet10t", Weights("random", "random"), seed=0)
    norm = next(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    backbone.unfreeze(norm.weight)
    assert norm.weight.requires_grad and not norm.bias.requires_grad
    assert backbone.is_frozen(norm) and not backbone.train()._frozen.isdisjoint({norm}) and not norm.training


def test_a_module_in_a_gap_sees_the_map_and_its_result_reaches_head_and_next_stage(backbone):
    class Shift(nn.Module):
        def forward(self, feature_map):
            self.seen = tuple(feature_map.shape)
            return feature_map + self.by

    images = torch.randn(1, 3, 56, 64)
    plain = backbone(images)
    shift = Shift()
    backbone.insert_after_stage(1, shift)
    try:
        shift.by = 0.0
        assert all(torch.equal(a, b) for a, b in zip(plain, backbone(images), strict=True))
        assert shift.seen == tuple(plain[1].shape)
        shift.by = torch.randn(shift.seen)
        moved = backbone(images)
        assert torch.equal(plain[0], moved[0])
        assert not any(torch.equal(a, b) for a, b in zip(plain[1:], moved[1:], strict=True))
        with pytest.raises(ValueError, match="already"):
            backbone.insert_after_stage(1, Shift())
    finally:
        backbone.gaps.clear()


def test_a_gap_that_does_not_exist_is_an_error(backbone):
    with pytest.raises(IndexError, match="no stage 4"):
        backbone.insert_after_stage(4, nn.Identity())


def test_prefix_tokens_pass_a_gap_untouched():
    backbone = load_backbone("deit_tiny_distilled_patch16_224", Weights("random", "random"), seed=0)
    tokens = []
    backbone.stages[1].register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    images = torch.randn(1, 3, 64, 64)
    backbone(images)
    backbone.insert_after_stage(0, nn.Dropout(p=1.0).train())
    backbone(images)
    assert torch.equal(tokens[0][:, :2], tokens[1][:, :2])
    assert tokens[1][:, 2:].abs().sum() == 0


def test_random_weights_depend_on_the_seed_alone():
    first, same, other = (load_backbone("resnet10t", Weights("random", "random"), seed=s) for s in (1, 1, 2))
    assert torch.equal(first.stem[0][0].weight, same.stem[0][0].weight)
    assert not torch.equal(first.stem[0][0].weight, other.stem[0][0].weight)


def test_drawing_random_weights_leaves_the_callers_randomness_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_backbone("resnet10t", Weights("random", "random"), seed=0)
    assert torch.equal(torch.rand(1), expected)
