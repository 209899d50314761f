"""FacT: its increments slice by slice, both forms, and published counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.fact import FacT
from methods.modules.fact import Increment, SharedFactors
from tests.support.tiny_methods import assert_merges, backbone, batch, count, disturb, segmenter


@pytest.mark.parametrize("form", ["tt", "tk"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb", "pvt_v2_b0"])
def test_fact_merges_in_both_forms(name, form):
    network = segmenter(FacT, name, form=form, rank=4)
    disturb(network)
    assert_merges(network, backbone(name))


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_increment_is_u_sigma_v_slice_by_slice(form):
    torch.manual_seed(0)
    tucker, rank, width = form == "tk", 2, 6
    shared = SharedFactors(width, rank, 9, tucker)
    nn.init.normal_(shared.v)
    wide = Increment(shared, True, 1, 4, 3, tucker, 0.5, 0.1).eval()
    tall = Increment(shared, False, 4, 1, 3, tucker, 0.5, 0.1).eval()
    for module, rows, columns in ((wide, 4, 1), (tall, 1, 4)):
        weight = module.weight()
        assert weight.shape == (rows * width, columns * width)
        for number in range(4):
            i, j = (0, number) if columns == 1 else (number, 0)
            if tucker:
                sigma = torch.einsum("ijk,k->ij", shared.core, shared.rows[:, 3 + number])
            else:
                sigma = module.middle[i * rank : (i + 1) * rank, j * rank : (j + 1) * rank]
            square = weight[j * width : (j + 1) * width, i * width : (i + 1) * width]
            torch.testing.assert_close(square, 0.5 * (shared.u @ sigma @ shared.v).T)
    x = torch.randn(2, 5, 4 * width)
    torch.testing.assert_close(tall(x), x @ tall.weight().T)


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_fact_trains_all_factors_in_both_forms(form):
    network = segmenter(FacT, "vit_tiny_patch16_224", form=form, rank=4).train()
    disturb(network)
    loss, _ = network(*batch())
    loss.backward()
    assert [key for key, parameter in network.trained_parameters() if not parameter.grad.abs().sum() > 0] == []
    names = [key for key in network.trained_state() if key.startswith("backbone.")]
    assert len(names) == {"tt": 2 + 4 * 4, "tk": 4}[form]


def test_fact_count_is_the_published_one():
    """Paper: the tiny FacT-TT of rank 4 has 8 K parameters on ViT-B (abstract); Swin-B at rank 16."""
    assert count(FacT, "vit_base_patch16_224", rank=4) == 2 * 768 * 4 + 12 * 12 * 16 == 8_448
    assert count(FacT, "vit_base_patch16_224", rank=16) == 2 * 768 * 16 + 12 * 12 * 256 == 61_440
    tucker = count(FacT, "vit_base_patch16_224", rank=32, form="tk")
    assert tucker == 2 * 768 * 32 + 144 * 32 + 32**3 == 86_528  # `FacTp` of the code is [r, 144]
    assert count(FacT, "swin_base_patch4_window7_224", rank=16) == 32 * (128 + 256 + 512 + 1024) + 24 * 12 * 256
