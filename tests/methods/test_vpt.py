"""Prompt tokens and borders of pixels: their structure and published counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from harness.models.network import build_segmenter
from methods.modules.vpt import Border
from methods.vpt import VPTDeep, VPTPad, VPTShallow
from tests.support.tiny_methods import CLASSES, backbone, count, logits, segmenter, train


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_border_keeps_the_size_of_maps_at_any_image_size(name):
    plain = backbone(name)
    adapted = segmenter(VPTPad, name).backbone
    for height, width in ((64, 64), (50, 75)):
        images = torch.randn(1, 3, height, width)
        for ours, theirs in zip(adapted(images), plain(images), strict=True):
            assert ours.shape == theirs.shape


def test_border_surrounds_the_image_and_is_cut_off_the_maps():
    border = Border(5, 64, (4, 8, 16, 32), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    images = torch.randn(2, 3, 64, 64)
    framed = border.surround(images)
    assert border.margin == 32 and framed.shape == (2, 3, 128, 128)
    assert torch.equal(framed[..., 32:96, 32:96], images)
    assert (framed[..., :27, :] == 0).all() and (framed[..., 101:] == 0).all()
    colours = torch.cat([border.top_bottom[:, :, :5], border.top_bottom[:, :, 5:]], dim=2)
    normalised = (colours - border.mean) / border.std
    torch.testing.assert_close(framed[:1, :, 27:32, 27:101], normalised[:, :, :5])
    torch.testing.assert_close(framed[1:, :, 96:101, 27:101], normalised[:, :, 5:])
    pooled = [nn.functional.avg_pool2d(framed, stride) for stride in border.strides]
    for cut, stride in zip(border(pooled), border.strides, strict=True):
        torch.testing.assert_close(cut, nn.functional.avg_pool2d(images, stride))


def test_border_is_resampled_and_every_pixel_gets_a_gradient():
    border = Border(3, 224, (4, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    border.surround(torch.zeros(1, 3, 32, 48)).sum().backward()
    assert (border.top_bottom.grad > 0).all() and (border.left_right.grad > 0).all()


def test_prompts_start_uniform_and_deep_ones_exist_for_every_block():
    adapted = segmenter(VPTDeep, "vit_tiny_patch16_224", length=7).backbone
    tokens = adapted.added["prompts"].tokens
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    assert tokens.shape == (4, 7, 192)
    assert 0.95 * bound < tokens.abs().max() <= bound and abs(tokens.mean()) < 0.05 * bound
    shallow = segmenter(VPTShallow, "vit_tiny_patch16_224", length=7).backbone
    assert shallow.added["prompts"].tokens.shape == (1, 7, 192)


def test_vpt_counts_are_those_of_the_paper():
    """Paper, section 3.2, storing visual prompts: with 50 prompts on ViT-B, p·d = 0.038 M and N·p·d = 0.46 M."""
    assert count(VPTShallow, "vit_base_patch16_224", length=50) == 50 * 768 == 38_400
    assert count(VPTDeep, "vit_base_patch16_224", length=50) == 12 * 50 * 768 == 460_800
    assert count(VPTDeep, "vit_large_patch16_224", length=10) == 245_760


def test_vpt_pad_count_is_that_of_the_released_code():
    """`setup_prompt_pad` of the released ResNet: [3, 2p, 224 + 2p] and [3, 224, 2p]; p = 5."""
    assert count(VPTPad, "resnet50", width=5) == 3 * 10 * 234 + 3 * 224 * 10 == 13_740


def test_fixed_pixels_are_the_control_that_trains_nothing():
    learned, fixed = (segmenter(VPTPad, "resnet10t", pixels=pixels) for pixels in ("learned", "fixed"))
    assert count(VPTPad, "resnet10t", pixels="fixed") == 0 == fixed.count_parameters().method
    assert torch.equal(logits(learned), logits(fixed))  # the same margin and the same first draw
    drawn = fixed.backbone.added["output"].top_bottom.clone()
    assert not train(learned) and not train(fixed)
    assert torch.equal(fixed.backbone.added["output"].top_bottom, drawn)
    assert not torch.equal(learned.backbone.added["output"].top_bottom, drawn)


def test_fixed_pixels_are_part_of_the_delta():
    network = segmenter(VPTPad, "resnet10t", pixels="fixed")
    train(network)
    with torch.random.fork_rng():
        rebuilt = build_segmenter(
            backbone("resnet10t"), VPTPad(VPTPad.Hyperparameters(pixels="fixed")), "fpn:8", CLASSES, seed=7
        )
    rebuilt.load_trained_state(network.trained_state())
    assert torch.equal(logits(rebuilt), logits(network))
