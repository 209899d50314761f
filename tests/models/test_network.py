"""The adapted network: counts, deltas that do not fit, and methods whose closed form is wrong."""

from __future__ import annotations

import copy

import pytest

from harness.method import methods
from harness.models.network import MethodError
from tests.support.tiny_methods import backbone, segmenter

NAME = "resnet10t"


def test_mismatched_delta_is_refused_and_changes_nothing():
    network = segmenter("spm", NAME)
    before = copy.deepcopy(network.state_dict())
    state = {key: tensor + 1 for key, tensor in network.trained_state().items()}
    first = next(iter(state))
    state[first] = state[first][..., :0]
    with pytest.raises(ValueError, match=first.replace(".", r"\.")):
        network.load_trained_state(state)
    assert all(before[key].equal(tensor) for key, tensor in network.state_dict().items())


def test_parameter_counts_of_method_and_head_add_up():
    counts = segmenter("full", NAME).count_parameters()
    bare = sum(parameter.numel() for parameter in backbone(NAME).parameters())
    assert counts.method == counts.backbone == bare
    assert counts.trainable == counts.method + counts.head
    assert segmenter("linear", NAME).count_parameters().method == 0


def test_wrong_closed_form_is_an_error(monkeypatch):
    monkeypatch.setattr(methods.get("spm"), "parameter_count", lambda *_: 7)
    with pytest.raises(MethodError, match="closed form gives 7"):
        segmenter("spm", NAME)
