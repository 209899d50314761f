"""A cut backbone computes what timm's network computes; what is frozen stays the same to the bit."""

import pytest
import timm
import torch
from torch import nn

from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.families import create, cut
from harness.models.backbones.weights import Weights, load_backbone

NAMES = ["resnet10t", "mobilenetv2_035", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]


@pytest.fixture(scope="module", params=NAMES)
def backbone(request) -> StagedBackbone:
    return load_backbone(request.param, Weights("random", "random"), seed=0)


def test_maps_of_a_cnn_are_those_of_timms_feature_extractor():
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


def test_only_unfrozen_batch_norm_statistics_move():
    backbone = load_backbone("resnet10t", Weights("random", "random"), seed=0)
    backbone.unfreeze(backbone.stages[3])
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.train()(torch.randn(4, 3, 64, 64))
    moved = {name for name, tensor in backbone.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved and all(name.startswith("stages.3.") for name in moved)
    assert backbone.stages[3].training and not backbone.stages[2].training


def test_unfreezing_a_parameter_keeps_its_modules_statistics_frozen():
    backbone = load_backbone("resnet10t", Weights("random", "random"), seed=0)
    norm = next(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    backbone.unfreeze(norm.weight)
    assert norm.weight.requires_grad and not norm.bias.requires_grad
    assert backbone.is_frozen(norm) and not backbone.train()._frozen.isdisjoint({norm}) and not norm.training


def test_module_after_a_stage_changes_the_head_and_the_next_stage(backbone):
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


def test_inserting_after_a_missing_stage_is_an_error(backbone):
    with pytest.raises(IndexError, match="no stage 4"):
        backbone.insert_after_stage(4, nn.Identity())


def test_module_after_a_stage_does_not_change_prefix_tokens():
    backbone = load_backbone("deit_tiny_distilled_patch16_224", Weights("random", "random"), seed=0)
    tokens = []
    backbone.stages[1].register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    images = torch.randn(1, 3, 64, 64)
    backbone(images)
    backbone.insert_after_stage(0, nn.Dropout(p=1.0).train())
    backbone(images)
    assert torch.equal(tokens[0][:, :2], tokens[1][:, :2])
    assert tokens[1][:, 2:].abs().sum() == 0
