"""Ladder side-tuning: gates, ladders, and that no gradient enters the backbone."""

from __future__ import annotations

import pytest
import torch

from methods.modules.side import GATE_TEMPERATURE, Rung
from methods.side import Side
from tests.support.tiny_methods import batch, segmenter, shapes, train


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "pvt_v2_b0"])
def test_no_gradient_goes_through_the_backbone(name):
    network = segmenter(Side, name).train()
    outputs = []
    for block in network.backbone.blocks:
        block.module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    loss, _ = network(*batch())
    loss.backward()
    assert len(outputs) == len(network.backbone.blocks)
    assert not any(output.requires_grad or output.grad_fn is not None for output in outputs)


def test_side_network_detaches_its_inputs():
    network = segmenter(Side, "resnet10t").train()
    images = batch()[0].requires_grad_()
    sum(feature_map.sum() for feature_map in network.backbone(images)).backward()
    assert images.grad is None


def test_zero_gate_mixes_half_and_half():
    rung = Rung(8, 4, expansion=2, first=False)
    torch.nn.init.zeros_(rung.fc2.weight)
    torch.nn.init.zeros_(rung.fc2.bias)
    state, activation = torch.randn(1, 4, 3, 3), torch.randn(1, 8, 3, 3)
    torch.testing.assert_close(rung(state, activation), (state + rung.down(activation)) / 2)
    torch.nn.init.constant_(rung.gate, 100 * GATE_TEMPERATURE)
    torch.testing.assert_close(rung(state, activation), state)


@pytest.mark.parametrize("settings", [{"every": 2}, {"reduction": 4, "expansion": 2}, {"every": 64}], ids=str)
def test_closed_form_holds_in_every_form(settings):
    network = segmenter(Side, "mobilenetv2_035", **settings)  # its count is checked on building
    assert train(network, steps=2) == set()


def test_every_second_block_is_counted_from_the_last_of_each_stage():
    rungs = Side(Side.Hyperparameters(every=2))._rungs(shapes("convnext_atto"))
    assert [[index for index, _ in stage] for stage in rungs] == [[1], [3], [5, 7, 9], [11]]
