"""partial, bias, norm and side: what each of them trains, and what it leaves.

Counts are derived here from the networks' shapes. Where a comment names a paper's table, the printed figure is quoted
as it is commonly restated; the tables themselves were not at hand. What was read (released code, public abstracts, two
benchmarks' READMEs) is said so beside the figure.
"""

import copy

import pytest
import torch

from harness.models.network import UnsupportedMethod
from methods.bias import Bias
from methods.modules.ladder import GATE_TEMPERATURE, Rung
from methods.norm import Norm
from methods.partial import Partial
from methods.side import Side
from tests.support.tiny_methods import BACKBONES, backbone, batch, segmenter, train

METHODS = [Partial, Bias, Norm, Side]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_the_backbone_trains_all_it_says_leaves_the_rest_and_is_rebuilt_from_its_delta(method, name):
    images, _ = batch()
    network = segmenter(method, name).eval()
    with torch.no_grad():
        for ours, bare in zip(network.backbone(images), backbone(name)(images), strict=True):
            assert torch.equal(ours, bare)
    trained = network.trained_state().keys()
    frozen = {key: tensor.clone() for key, tensor in network.state_dict().items() if key not in trained}
    assert train(network, steps=2) == set()
    after = network.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in frozen.items())
    rebuilt = segmenter(method, name)
    rebuilt.load_trained_state({key: tensor.clone() for key, tensor in network.trained_state().items()})
    with torch.no_grad():
        assert torch.equal(network.eval()(images), rebuilt.eval()(images))


def method_names(network):
    return {name.removeprefix("backbone.") for name, _ in network.trained_parameters() if name.startswith("backbone.")}


def test_partial_trains_the_last_blocks_and_the_output_norm():
    names = method_names(segmenter(Partial, "vit_tiny_patch16_224", blocks=2))
    others = {name for name in names if not name.startswith("stages.")}
    assert others == {"output_norm.weight", "output_norm.bias"}
    assert {".".join(name.split(".")[:3]) for name in names - others} == {"stages.2.2", "stages.3.3"}
    assert len(names - others) == 2 * 12


def test_partial_trains_the_merging_between_two_trained_blocks_and_not_the_one_before_them():
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


def test_partial_1_of_a_vit_b_has_the_parameters_of_a_block_and_a_norm():
    c = 768
    block = 2 * 2 * c + (3 * c * c + 3 * c) + (c * c + c) + (4 * c * c + 4 * c) + (4 * c * c + c)
    assert Partial(Partial.Hyperparameters()).parameter_count(backbone("vit_base_patch16_224"), 5) == block + 2 * c


def test_partial_keeps_statistics_when_told_to():
    for freeze, moves in ((False, True), (True, False)):
        network = segmenter(Partial, "resnet10t", freeze_statistics=freeze)
        before = {key: tensor.clone() for key, tensor in network.state_dict().items() if "running_mean" in key}
        train(network, steps=1)
        moved = {key for key, tensor in network.state_dict().items() if key in before and (tensor != before[key]).any()}
        assert any("backbone.stages.3" in key for key in moved) == moves
        assert not any("backbone.stages.2" in key for key in moved)


def test_partial_says_when_there_are_too_few_blocks():
    with pytest.raises(UnsupportedMethod, match="blocks=5, and the network has 4"):
        segmenter(Partial, "resnet10t", blocks=5)


def test_bias_on_a_vit_b_has_the_published_count():
    """0.103 M in table 1 of FacT (Jie & Deng, arXiv 2212.03145): 11 C a block, and the patches' and last norm's."""
    c = 768
    by_hand = 12 * (3 * c + c + 4 * c + c + 2 * c) + c + c
    counted = Bias(Bias.Hyperparameters()).parameter_count(backbone("vit_base_patch16_224"), 5)
    assert counted == by_hand == 102_912
    assert f"{counted / 1e6:.3f}" == "0.103"


def test_bias_trains_separate_query_and_value_biases_and_no_table_of_positions():
    names = method_names(segmenter(Bias, "eva02_tiny_patch14_224"))
    assert "stages.0.blocks.0.attn.q_bias" in names
    swin = method_names(segmenter(Bias, "swin_tiny_patch4_window7_224"))
    assert {name.rsplit(".", 1)[1] for name in swin} == {"bias"}


def test_norm_on_a_vit_b_is_25_norms_of_scale_and_shift():
    assert Norm(Norm.Hyperparameters()).parameter_count(backbone("vit_base_patch16_224"), 5) == 25 * 2 * 768


def test_norm_on_a_cnn_leaves_the_statistics():
    network = segmenter(Norm, "resnet10t")
    assert all(not network.backbone.is_frozen(m) or not m.training for m in network.train().backbone.modules())
    assert not any("running" in name for name in network.trained_state() if name.startswith("backbone."))


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "pvt_v2_b0"])
def test_no_gradient_goes_through_the_backbone_beside_which_a_side_network_stands(name):
    network = segmenter(Side, name).train()
    outputs = []
    for block in network.backbone.blocks:
        block.module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    loss, _ = network(*batch())
    loss.backward()
    assert len(outputs) == len(network.backbone.blocks)
    assert not any(output.requires_grad or output.grad_fn is not None for output in outputs)


def test_a_side_network_detaches_whatever_it_is_fed():
    network = segmenter(Side, "resnet10t").train()
    images = batch()[0].requires_grad_()
    sum(feature_map.sum() for feature_map in network.backbone(images)).backward()
    assert images.grad is None


def test_a_gate_that_is_zero_mixes_half_and_half():
    rung = Rung(8, 4, expansion=2, first=False)
    torch.nn.init.zeros_(rung.fc2.weight)
    torch.nn.init.zeros_(rung.fc2.bias)
    state, activation = torch.randn(1, 4, 3, 3), torch.randn(1, 8, 3, 3)
    torch.testing.assert_close(rung(state, activation), (state + rung.down(activation)) / 2)
    torch.nn.init.constant_(rung.gate, 100 * GATE_TEMPERATURE)
    torch.testing.assert_close(rung(state, activation), state)


@pytest.mark.parametrize("settings", [{"every": 2}, {"reduction": 4, "expansion": 2}, {"every": 64}], ids=str)
def test_a_side_network_counts_what_it_trains_in_every_form(settings):
    network = segmenter(Side, "mobilenetv2_035", **settings)  # its count is checked on building
    assert train(network, steps=2) == set()


def test_a_ladder_at_every_second_block_keeps_the_last_of_each_stage():
    rungs = Side(Side.Hyperparameters(every=2))._rungs(backbone("convnext_atto"))
    assert [[index for index, _ in stage] for stage in rungs] == [[1], [3], [5, 7, 9], [11]]


def test_side_networks_of_copies_do_not_meet():
    network = segmenter(Side, "resnet10t").eval()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        network.backbone(batch()[0])
        for ours, other in zip(network.backbone(batch()[0]), twin.backbone(batch()[0]), strict=True):
            assert torch.equal(ours, other)


@pytest.mark.parametrize("method", [Partial, Bias, Norm])
def test_what_is_the_backbones_own_needs_no_folding(method):
    network = segmenter(method, "resnet10t")
    assert method.mergeable
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    network.method.merge(network.backbone)
    assert network.state_dict().keys() == before.keys()
    assert list(network.backbone.state_dict()) == list(backbone("resnet10t").state_dict())
