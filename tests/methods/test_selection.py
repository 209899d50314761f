"""full, partial, bias and norm: which tensors of the backbone they train, and published counts.

Counts are derived here from the networks' shapes. Where a comment names a paper's table, the printed number is quoted
as it is commonly restated; the tables themselves were not available.
"""

from __future__ import annotations

import pytest
import torch

from harness.models.network import UnsupportedMethod
from methods.bias import Bias
from methods.full import Full
from methods.norm import Norm
from methods.partial import Partial
from studies.search.spec import declared_space
from tests.support.tiny_methods import backbone, count, logits, segmenter, train


def method_names(network):
    return {name.removeprefix("backbone.") for name, _ in network.trained_parameters() if name.startswith("backbone.")}


def test_partial_trains_the_last_blocks_and_the_output_norm():
    names = method_names(segmenter(Partial, "vit_tiny_patch16_224", blocks=2))
    others = {name for name in names if not name.startswith("stages.")}
    assert others == {"output_norm.weight", "output_norm.bias"}
    assert {".".join(name.split(".")[:3]) for name in names - others} == {"stages.2.2", "stages.3.3"}
    assert len(names - others) == 2 * 12


def test_partial_trains_the_merging_between_trained_blocks_only():
    names = method_names(segmenter(Partial, "swin_tiny_patch4_window7_224", blocks=2))
    assert {name.split(".")[2] for name in names} == {"blocks"}
    more = method_names(segmenter(Partial, "swin_tiny_patch4_window7_224", blocks=4))
    assert {".".join(name.split(".")[:4]) for name in more if "blocks" in name} == {
        "stages.2.blocks.0",
        "stages.2.blocks.1",
        "stages.3.blocks.0",
        "stages.3.blocks.1",
    }
    assert "stages.3.downsample.reduction.weight" in more
    assert not any(name.startswith("stages.2.downsample") for name in more)


def test_partial_count_in_a_vit_b_is_a_block_and_a_norm():
    c = 768
    block = 2 * 2 * c + (3 * c * c + 3 * c) + (c * c + c) + (4 * c * c + 4 * c) + (4 * c * c + c)
    assert count(Partial, "vit_base_patch16_224") == block + 2 * c


@pytest.mark.parametrize("statistics", ["train", "frozen"])
@pytest.mark.parametrize(("method", "first"), [(Full, 0), (Partial, 3)])
def test_statistics_of_trained_stages_move_unless_frozen(method, first, statistics):
    network = segmenter(method, "resnet10t", statistics=statistics)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items() if "running_mean" in key}
    train(network, steps=1)
    after = network.state_dict()
    moved = [key for key, tensor in before.items() if (tensor != after[key]).any()]
    stages = {int(key.split(".")[2]) for key in moved if key.startswith("backbone.stages")}
    assert stages == (set(range(first, 4)) if statistics == "train" else set())
    stored = any("running_mean" in key for key in network.trained_state() if key.startswith("backbone."))
    assert stored == (statistics == "train")


@pytest.mark.parametrize("method", [Full, Partial])
def test_statistics_are_searched(method):
    assert declared_space(method)["statistics"].choices == ("train", "frozen")


def test_statistics_change_nothing_without_batch_norms():
    one, other = (segmenter(Full, "vit_tiny_patch16_224", statistics=choice) for choice in ("train", "frozen"))
    for network in (one, other):
        torch.manual_seed(0)  # the head's dropout
        train(network)
    assert one.trained_state().keys() == other.trained_state().keys()
    assert torch.equal(logits(one), logits(other))


def test_partial_refuses_more_blocks_than_there_are():
    with pytest.raises(UnsupportedMethod, match="blocks=5, and the network has 4"):
        segmenter(Partial, "resnet10t", blocks=5)


def test_bias_count_is_the_published_one():
    """0.103 M in table 1 of FacT (Jie & Deng, arXiv 2212.03145): 11 C a block, and the patches' and last norm's."""
    c = 768
    by_hand = 12 * (3 * c + c + 4 * c + c + 2 * c) + c + c
    counted = count(Bias, "vit_base_patch16_224")
    assert counted == by_hand == 102_912
    assert f"{counted / 1e6:.3f}" == "0.103"


def test_bias_trains_query_and_value_biases_but_no_position_tables():
    names = method_names(segmenter(Bias, "eva02_tiny_patch14_224"))
    assert "stages.0.blocks.0.attn.q_bias" in names
    swin = method_names(segmenter(Bias, "swin_tiny_patch4_window7_224"))
    assert {name.rsplit(".", 1)[1] for name in swin} == {"bias"}


def test_norm_count_in_a_vit_b_is_25_scales_and_shifts():
    assert count(Norm, "vit_base_patch16_224") == 25 * 2 * 768


def test_norm_freezes_statistics():
    network = segmenter(Norm, "resnet10t")
    assert all(not network.backbone.is_frozen(m) or not m.training for m in network.train().backbone.modules())
    assert not any("running" in name for name in network.trained_state() if name.startswith("backbone."))


@pytest.mark.parametrize("method", [Partial, Bias, Norm])
def test_merging_does_not_change_the_network(method):
    network = segmenter(method, "resnet10t")
    assert method.mergeable
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    network.method.merge(network.backbone)
    assert network.state_dict().keys() == before.keys()
    assert list(network.backbone.state_dict()) == list(backbone("resnet10t").state_dict())
