"""What every method must do, on small networks of every kind: to the bit where the contract allows rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from harness.method import Method, methods
from harness.models.network import UnsupportedMethod
from tests.support.tiny_methods import (
    NETWORKS,
    assert_merges,
    backbone,
    batch,
    build,
    close,
    disturb,
    logits,
    segmenter,
    train,
)

CNNS = {"resnet10t", "mobilenetv2_035"}
BRANCHED = NETWORKS.keys() - CNNS
PLAIN = {name for name in NETWORKS if name.startswith(("vit", "eva"))}
PEFT = {"dora", "hra", "ia3", "loha", "lokr", "lora", "oft"}
ROUNDS = PEFT - {"lora"}
"""They start as the frozen backbone up to rounding: peft computes with their factors."""
SUPPORTED = {name: set(NETWORKS) for name in methods.names()} | {
    "adaptformer": BRANCHED,
    "convpass": BRANCHED,
    "repadapter": BRANCHED,
    "conv_adapter": CNNS | {"convnext_atto"},
    "fact": {name for name in BRANCHED if not name.startswith(("convnext", "eva02_tiny", "eva02_base"))},
    "vpt_deep": PLAIN,
    "vpt_shallow": PLAIN,
}
VARIANTS = {*ROUNDS, "vpt_shallow", "linear"}
"""They share nearly all of their code with another method, or attach nothing: four networks are enough."""
FEW = {"resnet10t", "pvt_v2_b0", "vit_tiny_patch16_224", "swinv2_tiny_window8_256"}
ALWAYS = {"resnet10t", "vit_tiny_patch16_224"}
SELECTIONS = {"full", "partial", "bias", "norm"}


def cases(wanted: Callable[[type[Method]], bool] = lambda _: True) -> Iterator[Any]:
    """Every method on `ALWAYS` and on every third of the other networks, in turn; the rest are long tests."""
    for turn, method in enumerate(methods.names()):
        networks = [name for name in NETWORKS if name in SUPPORTED[method] and (method not in VARIANTS or name in FEW)]
        others = [name for name in networks if name not in ALWAYS]
        late = {name for place, name in enumerate(others) if (place + turn) % 3}
        for name in networks if wanted(methods.get(method)) else ():
            yield pytest.param(method, name, marks=[pytest.mark.exhaustive] if name in late else [])


@pytest.mark.parametrize(("method", "name"), cases(lambda method: not method.changes_start))
def test_network_starts_as_the_frozen_backbone(method: str, name: str) -> None:
    with torch.no_grad():
        maps = segmenter(method, name).eval().backbone(batch()[0])
        for ours, expected in zip(maps, backbone(name)(batch()[0]), strict=True):
            assert close(ours, expected) if method in ROUNDS else torch.equal(ours, expected)


@pytest.mark.parametrize(("method", "name"), cases())
def test_training_changes_exactly_what_the_delta_restores(method: str, name: str) -> None:
    bare = backbone(name)
    pretrained = {key: (tensor, tensor.clone()) for key, tensor in bare.state_dict(keep_vars=True).items()}
    network = build(method, bare)
    trained = {tensor.data_ptr() for tensor in network.trained_state().values()}
    assert train(network) == set()
    for key, (tensor, before) in pretrained.items():
        assert tensor.data_ptr() in trained or (not tensor.requires_grad and torch.equal(tensor, before)), key

    delta = {key: tensor.clone() for key, tensor in network.trained_state().items()}
    if method not in SELECTIONS:
        assert not {key.removeprefix("backbone.") for key in delta} & pretrained.keys()
    rebuilt = segmenter(method, name)
    rebuilt.load_trained_state(delta)
    assert torch.equal(logits(rebuilt), logits(network))


@pytest.mark.parametrize("method", methods.names())
def test_copied_network_is_independent(method: str) -> None:
    name = "convnext_atto" if method == "conv_adapter" else "vit_tiny_patch16_224"
    network = segmenter(method, name).eval()
    twin = copy.deepcopy(network)
    before = logits(network)
    disturb(twin)
    with torch.no_grad():
        twin(batch(32, 32)[0])
    assert torch.equal(logits(network), before)
    assert not torch.equal(logits(twin), before)


@pytest.mark.parametrize(("method", "name"), cases(lambda method: method.mergeable and method.name not in SELECTIONS))
def test_merged_network_computes_the_same_with_the_modules_of_the_backbone(method: str, name: str) -> None:
    network = segmenter(method, name)
    start = logits(network)
    train(network)
    assert not close(logits(network), start)
    assert_merges(network, backbone(name))


@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m in methods.names() for n in NETWORKS if n not in SUPPORTED[m]]
)
def test_unsupported_network_is_refused_with_a_reason(method: str, name: str) -> None:
    with pytest.raises(UnsupportedMethod, match=rf"{method} on {name}: \w+ \w+ \w+"):
        segmenter(method, name)
