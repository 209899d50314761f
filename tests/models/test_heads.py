"""Every head on a CNN and on a ViT: logits of the classes; initialisation depends on the seed only."""

import pytest
import torch
from torch import nn

from harness.errors import UserError
from harness.method import methods
from harness.models.backbones.weights import Weights, load_backbone
from harness.models.head_inputs import OutputNorms
from harness.models.heads import build_auxiliary_head, build_head, heads
from harness.models.network import build_segmenter
from tests.support.tiny_methods import segmenter, shapes

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


UNNORMED = ["convnext_atto", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "poolformer_s12"]
NORMED = [CNN, VIT, "pvt_v2_b0", "eva02_base_patch14_224", "tf_efficientnet_lite0"]


@pytest.mark.parametrize("name", [*UNNORMED, *NORMED])
def test_head_trains_a_norm_for_each_output_that_it_reads_and_that_has_none(name):
    built = shapes(name)
    read = {"linear": [3], "fcn:8": [3], "fpn:8": range(4), "uper:8": range(4)}
    modules = [(build_head(head, built, 5, seed=0), stages) for head, stages in read.items()]
    for module, stages in [*modules, (build_auxiliary_head(built, 5, seed=0), [2])]:
        norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
        assert [norm.normalized_shape for norm in norms] == [
            (built.channels[stage],) for stage in stages if name in UNNORMED
        ]
        assert all(parameter.requires_grad for norm in norms for parameter in norm.parameters())


@pytest.mark.parametrize("channels_last", [False, True])
def test_output_norm_normalises_each_position_and_keeps_the_memory_layout(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    norms = OutputNorms((6, 8), [1])
    maps = [torch.randn(2, channels, 5, 7).to(memory_format=layout) for channels in (6, 8)]
    unread, normed = norms(maps)
    assert unread is maps[0] and normed.is_contiguous(memory_format=layout)
    torch.testing.assert_close(normed.mean(1), torch.zeros(2, 5, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(1, correction=0), torch.ones(2, 5, 7), atol=1e-3, rtol=0)


def test_output_norms_are_the_heads_and_in_its_delta():
    network = segmenter("linear", "convnext_atto")
    counts = network.count_parameters()
    assert counts.method == 0 and {"head.0.0.weight", "head.0.3.bias"} <= network.trained_state().keys()
    norms = 2 * sum(network.backbone.channels)
    assert counts.head == norms + sum(p.numel() for part in network.head[1:] for p in part.parameters())


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
