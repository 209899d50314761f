"""What every method owes, and SPM's structure and ablations."""

import copy

import pytest
import torch
from torch.nn import functional as F

from harness.errors import UserError
from harness.method import methods
from harness.models.backbones.weights import Weights, load_backbone
from harness.models.losses import cross_entropy, labels_at
from harness.models.network import MethodError, UnsupportedMethod, build_segmenter
from methods.modules.matcher import Matcher, matcher_parameters

BACKBONES = ["resnet10t", "mobilenetv2_035", "vit_tiny_patch16_224"]
CLASSES = 5
OURS = ["full", "linear", "spm"]
"""To the bit here; the contract, which all methods keep, allows for rounding."""


def backbone(name="resnet10t"):
    return load_backbone(name, Weights("random", "random"), seed=0)


def segmenter(method, name="resnet10t", head="fpn:16", seed=0, **settings):
    built = methods.get(method)
    return build_segmenter(backbone(name), built(built.Hyperparameters(**settings)), head, CLASSES, seed)


def batch(size=64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, size, size, generator=generator)
    masks = torch.randint(0, CLASSES, (4, size, size), generator=generator, dtype=torch.uint8)
    masks[:, :5] = 255
    return images, masks


def train_steps(network, steps=3):
    optimizer = torch.optim.AdamW([p for _, p in network.trained_parameters()], lr=1e-2)
    network.train()
    for _ in range(steps):
        loss, _ = network(*batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", OURS)
def test_step_zero_computes_what_the_frozen_backbone_computes(method, name):
    images, _ = batch()
    network = segmenter(method, name).eval()
    for ours, bare in zip(network.backbone(images), backbone(name)(images), strict=True):
        assert torch.equal(ours, bare)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", ["linear", "spm"])
def test_training_leaves_every_frozen_parameter_and_buffer_as_it_was(method, name):
    network = segmenter(method, name)
    trained = network.trained_state().keys()
    frozen = {k: v.clone() for k, v in network.state_dict().items() if k not in trained}
    assert len(frozen) == len(backbone(name).state_dict())
    train_steps(network)
    after = network.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in frozen.items())


@pytest.mark.parametrize("method", OURS)
def test_a_stored_delta_gives_identical_logits_and_holds_trained_tensors_alone(method):
    images, _ = batch()
    network = segmenter(method)
    train_steps(network)
    stored = {key: tensor.clone() for key, tensor in network.trained_state().items()}
    rebuilt = segmenter(method)
    rebuilt.load_trained_state(stored)
    assert torch.equal(network.eval()(images), rebuilt.eval()(images))
    if method != "full":
        assert not any(key.startswith(("backbone.stem", "backbone.stages")) for key in stored)


def test_a_delta_that_does_not_fit_is_refused_and_changes_nothing():
    network = segmenter("spm")
    before = copy.deepcopy(network.state_dict())
    state = {key: tensor + 1 for key, tensor in network.trained_state().items()}
    first = next(iter(state))
    state[first] = state[first][..., :0]
    with pytest.raises(ValueError, match=first.replace(".", r"\.")):
        network.load_trained_state(state)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


def test_parameters_are_counted_apart_and_add_up():
    counts = segmenter("full").count_parameters()
    bare = sum(parameter.numel() for parameter in backbone().parameters())
    assert counts.method == counts.backbone == bare
    assert counts.trainable == counts.method + counts.head
    assert segmenter("linear").count_parameters().method == 0


def test_full_moves_batch_norm_statistics_unless_told_not_to():
    for freeze, moves in ((False, True), (True, False)):
        network = segmenter("full", freeze_statistics=freeze)
        before = {k: v.clone() for k, v in network.backbone.state_dict().items() if "running_" in k}
        train_steps(network, steps=1)
        after = network.backbone.state_dict()
        assert any(not torch.equal(v, after[k]) for k, v in before.items()) == moves
        assert any("running_mean" in k for k in network.trained_state() if k.startswith("backbone.")) == moves


def test_a_wrong_closed_form_is_caught(monkeypatch):
    monkeypatch.setattr(methods.get("spm"), "parameter_count", lambda *_: 7)
    with pytest.raises(MethodError, match="closed form says 7"):
        segmenter("spm")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hidden": 8, "kernel": 5},
        {"iterations": 1},
        {"iterations": 4, "share_weights": False},
        {"guidance": False},
        {"auxiliary": 0},
        {"guidance": False, "auxiliary": 0},
        {"gaps": "1,3"},
        {"gaps": "2"},
        {"working_stride": 4},
        {"working_stride": 64},
        {"relative": True},
        {"relative": True, "working_stride": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_spm_counts_what_it_trains_and_trains_all_of_it_in_every_ablation(settings, name):
    network = segmenter("spm", name, **settings).train()  # its count is checked on building
    train_steps(network, steps=1)
    loss, _ = network(*batch())
    loss.backward()
    assert [key for key, parameter in network.trained_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_a_matchers_count_is_that_of_a_hand_count():
    """C = 24, K = 6, d = 32, k = 3, guided, shared cell: see the layers of `Matcher`."""
    reduce, semantic, expand = 24 * 32 + 32, 32 * 6 + 6, 32 * 24 + 24
    inputs = 32 * 9 + 32 * 96 + 96
    recurrent = 2 * (38 * 9) + 38 * 64 + 38 * 32
    options = {"hidden": 32, "iterations": 3, "kernel": 3, "share_weights": True, "guidance": True}
    assert matcher_parameters(24, 6, **options) == reduce + semantic + expand + inputs + recurrent
    module = Matcher(24, 6, pool=4, **options)
    assert sum(parameter.numel() for parameter in module.parameters()) == matcher_parameters(24, 6, **options)
    assert matcher_parameters(24, 6, relative=True, **options) == matcher_parameters(24, 6, **options) + expand


def test_a_knob_that_came_later_is_in_a_spec_only_where_it_changes_something():
    """So that runs from before it count on."""
    hyperparameters = methods.get("spm").Hyperparameters
    before = hyperparameters.parse("spm", {"relative": "false"})
    assert "relative" not in before.non_default()
    assert hyperparameters.parse("spm", {"relative": "true"}).non_default() == before.non_default() | {"relative": True}
    assert hyperparameters.parse("spm", before.non_default()) == before


def test_gaps_that_do_not_exist_are_unsupported_with_the_reason():
    with pytest.raises(UnsupportedMethod, match="gap 4 does not exist: 3 gaps stand between 4 stages"):
        segmenter("spm", gaps="1,4")


def test_an_even_kernel_is_out_of_range_and_gaps_are_kept_in_one_order():
    hyperparameters = methods.get("spm").Hyperparameters
    with pytest.raises(UserError, match="kernel: 4 is even"):
        hyperparameters.parse("spm", {"kernel": "4"})
    assert hyperparameters.parse("spm", {"gaps": "3,1,1"}).gaps == "1,3"


def test_no_matcher_stands_behind_the_last_stage():
    assert sorted(segmenter("spm").backbone.gaps) == ["0", "1", "2"]


def test_pooling_and_upsampling_commute_with_the_convolutions_that_run_at_the_working_resolution():
    torch.manual_seed(0)
    convolution, x = torch.nn.Conv2d(6, 4, 1), torch.randn(1, 6, 10, 14)
    pooled = F.avg_pool2d(x, 4, ceil_mode=True, count_include_pad=False)
    after = F.avg_pool2d(convolution(x), 4, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(convolution(pooled), after)
    small = torch.randn(1, 6, 3, 4)
    up = {"size": (10, 14), "mode": "bilinear", "align_corners": False}
    torch.testing.assert_close(convolution(F.interpolate(small, **up)), F.interpolate(convolution(small), **up))


def test_spm_works_on_a_map_smaller_than_its_pooling():
    network = segmenter("spm", working_stride=256).eval()
    assert network(torch.randn(1, 3, 32, 32)).shape[1] == CLASSES


def test_the_auxiliary_loss_is_the_weighted_sum_over_gaps_and_iterations():
    network = segmenter("spm", auxiliary=0.6, iterations=2).train()
    images, masks = batch()
    network(images, masks)
    matchers = list(network.backbone.gaps.values())
    assert [len(matcher.semantic_maps) for matcher in matchers] == [2, 2, 2]
    each = [cross_entropy(m, labels_at(masks, m.shape[-2:])) for matcher in matchers for m in matcher.semantic_maps]
    torch.testing.assert_close(network.method.auxiliary_loss(masks), 0.6 / 2 * sum(each))


def test_semantic_maps_are_not_kept_when_nothing_is_trained():
    network = segmenter("spm").eval()
    network(batch()[0])
    assert all(matcher.semantic_maps == [] for matcher in network.backbone.gaps.values())


def test_the_loss_ignores_what_is_unlabelled_and_is_zero_without_labels():
    logits = torch.randn(2, CLASSES, 8, 8)
    masks = torch.randint(0, CLASSES, (2, 8, 8))
    masks[0] = 255
    expected = F.cross_entropy(logits[1:], masks[1:])
    torch.testing.assert_close(cross_entropy(logits, masks), expected)
    assert cross_entropy(logits, torch.full_like(masks, 255)) == 0
