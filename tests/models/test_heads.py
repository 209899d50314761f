"""Every head on a CNN and on a ViT: logits of the classes; initialisation depends on the seed only."""

import pytest
import torch

from harness.errors import UserError
from harness.method import methods
from harness.models.backbones.weights import Weights, load_backbone
from harness.models.heads import build_head, heads
from harness.models.network import build_segmenter

CNN, VIT = "resnet10t", "vit_tiny_patch16_224"


def backbone(name):
    return load_backbone(name, Weights("random", "random"), seed=0)


@pytest.mark.parametrize("name", [CNN, VIT])
@pytest.mark.parametrize("head", [*(h for h in heads.names() if h != "setr_pup"), "fpn:32", "uper:32", "fcn:32"])
def test_head_gives_logits_with_a_gradient(name, head):
    maps = backbone(name)(torch.randn(2, 3, 64, 96))
    module = build_head(head, backbone(name), 5, seed=0)
    logits = module(maps)
    assert logits.shape[:2] == (2, 5) and logits.shape[3] / logits.shape[2] == 1.5
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_setr_pup_needs_a_vit():
    assert build_head("setr_pup", backbone(VIT), 5, seed=0)(backbone(VIT)(torch.randn(1, 3, 32, 32))).shape[1] == 5
    with pytest.raises(UserError, match="strides 4, 8, 16, 32; use fpn or uper"):
        build_head("setr_pup", backbone(CNN), 5, seed=0)


def test_head_sizes_are_those_of_mmsegmentation():
    """Counted by hand for ResNet-10-t's channels C = (64, 128, 256, 512), K = 19 classes, no convolution biases."""
    c, k = (64, 128, 256, 512), 19
    built = backbone(CNN)
    assert built.channels == c

    def size(head):
        return sum(parameter.numel() for parameter in build_head(head, built, k, seed=0).parameters())

    assert size("linear") == (c[-1] + 1) * k
    # FPN: laterals 1×1 and outputs 3×3 with bias. Its head: 1, 1, 2, 3 blocks of 3×3 + BN by level, then the classes.
    pyramid = sum((n + 1) * 256 for n in c) + 4 * (9 * 256 * 256 + 256)
    blocks = 4 * (9 * 256 * 128) + 3 * (9 * 128 * 128) + 7 * 2 * 128
    assert size("fpn") == pyramid + blocks + (128 + 1) * k
    # FCN: two 3×3 and one over the concatenation with its input.
    assert size("fcn") == 9 * 512 * (512 + 512 + 1024) + 3 * 2 * 512 + (512 + 1) * k


def test_head_depends_on_the_seed_and_not_on_the_method():
    def first_tensor(method, seed):
        built = methods.get(method)
        network = build_segmenter(backbone(CNN), built(built.Hyperparameters()), "fpn:16", 5, seed)
        return torch.cat([parameter.flatten() for parameter in network.head.parameters()])

    reference = first_tensor("linear", 0)
    assert all(torch.equal(reference, first_tensor(method, 0)) for method in ("full", "linear", "spm"))
    assert not torch.equal(reference, first_tensor("linear", 1))


def test_building_a_head_prints_nothing(capfd):
    build_head("uper:16", backbone(CNN), 2, seed=0)
    assert capfd.readouterr() == ("", "")
