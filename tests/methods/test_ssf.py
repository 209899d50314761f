"""SSF: the places of scales and shifts, merging into layers of every kind, and published counts."""

from __future__ import annotations

import pytest
import torch

from methods.ssf import SSF
from tests.support.tiny_methods import assert_merges, backbone, count, disturb, segmenter


@pytest.mark.parametrize("name", ["regnetx_002", "convnextv2_atto", "poolformer_s12"])
def test_ssf_merges_into_norms_of_every_kind(name):
    network = segmenter(SSF, name)
    disturb(network)
    assert_merges(network, backbone(name))


def test_ssf_is_between_a_norm_and_its_fused_activation():
    adapted = segmenter(SSF, "mobilenetv2_035").backbone
    with torch.no_grad():
        adapted.added["stem_1_drop_after"].shift.fill_(-1e6)
    stem = adapted.stem(torch.randn(1, 3, 32, 32))
    assert (stem == 0).all()  # ReLU6 came after the shift


def test_ssf_count_is_the_published_one():
    """Paper, ViT-B/16: 0.97 M tuned on ImageNet-1K with its classifier of 1000, 0.28 M on CIFAR-100."""
    ours = count(SSF, "vit_base_patch16_224")
    block = 768 + 3 * 768 + 768 + 768 + 4 * 768 + 768  # norm, qkv, proj, norm, fc1, fc2
    assert ours == 2 * (768 + 12 * block + 768) == 205_824
    assert round((ours + 769_000) / 1e6, 2) == 0.97
    assert round((ours + 76_900) / 1e6, 2) == 0.28


def test_ssf_count_in_swin_includes_the_merging_layers():
    """Swin-B by the released code: 22C a block, the norm of each merge, patch embedding and its norm; ours adds the
    merges' linear layers, and has no classifier's norm."""
    blocks = 22 * (2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024)
    merges, embedding, reductions = 8 * (128 + 256 + 512), 4 * 128, 4 * (128 + 256 + 512)
    assert count(SSF, "swin_base_patch4_window7_224") == blocks + merges + embedding + reductions
