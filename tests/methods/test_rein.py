"""Rein: the refinement's formula, what blocks share, and published counts."""

from __future__ import annotations

import math

import pytest
import torch

from methods.modules.rein import Refinement, SharedRefinement
from methods.rein import Rein
from tests.support.tiny_methods import backbone, batch, count, segmenter


def test_refinement_follows_the_formula_and_skips_the_first_token():
    torch.manual_seed(0)
    shared = SharedRefinement(8, 0.25)
    module = Refinement(shared, True, channels=8, tokens=5, rank=2, patch=4)
    f = torch.randn(2, 8, 3, 4)
    tokens = module.a @ module.b
    expected = torch.empty_like(f)
    for n in range(2):
        for y in range(3):
            for x in range(4):
                feature = f[n, :, y, x]
                share = torch.softmax(tokens @ feature / math.sqrt(8), dim=0)
                gathered = sum(share[m] * shared.token_to_feature(tokens[m]) for m in range(1, 5))
                expected[n, :, y, x] = feature + 0.25 * shared.refine(gathered + feature)
    torch.testing.assert_close(module(f), expected)


def test_rein_skips_prefix_tokens_and_shares_one_refinement():
    network = segmenter(Rein, "deit_tiny_distilled_patch16_224", rank=2, tokens=4)
    seen = []
    block = network.backbone.blocks[0].module
    block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    plain = backbone("deit_tiny_distilled_patch16_224")
    plain.blocks[0].module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images, _ = batch()
    network.eval().backbone(images), plain(images)
    assert torch.equal(seen[0][:, :2], seen[1][:, :2]) and not torch.equal(seen[0][:, 2:], seen[1][:, 2:])
    assert sum(name.endswith("refine.weight") for name, _ in network.trained_parameters()) == 1


@pytest.mark.parametrize(("rank", "published"), [(4, 2.67), (8, 2.77), (16, 2.99), (32, 3.42), (64, 4.28)])
def test_rein_count_is_the_published_one_without_the_link_to_queries(rank, published):
    """Paper, DINOv2 ViT-L, 100 tokens, by rank. The link is `transform`, C -> 256, and `merge`, 768 -> 256."""
    ours = count(Rein, "vit_large_patch14_dinov2", rank=rank)
    link = (1024 + 1) * 256 + (3 * 256 + 1) * 256
    assert round((ours + link) / 1e6, 2) == published
    if rank == 16:
        assert ours == 2_530_817 and ours + link == 2_990_081
