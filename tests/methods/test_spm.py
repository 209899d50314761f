"""SPM: what a matcher computes, its ablations, and the memory of a step compared with full fine-tuning."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.engine.cost import step_cost
from harness.errors import UserError
from harness.method import methods
from harness.models.backbones.families import create, cut
from harness.models.losses import cross_entropy, labels_at
from harness.models.network import UnsupportedMethod, build_segmenter
from harness.spec import Budget
from methods.modules.spm import Matcher, hand_on, matcher_parameters
from tests.support.tiny_methods import CLASSES, batch, close, disturb, logits, segmenter, train

Carried = tuple[Tensor, Tensor] | None


def _as_written(matcher: Matcher, f: Tensor, carried: Carried = None) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, m_0 .. m_T and h_T, equation by equation as in the docstrings of `Matcher` and `SeparableGRUCell`."""
    seen = f.detach() if matcher.relative else f
    pooled = F.avg_pool2d(seen, matcher.pool, ceil_mode=True, count_include_pad=False)
    size = pooled.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    x = matcher.reduce(pooled / size if matcher.relative else pooled)
    state_before, map_before = (_bilinear(tensor, x) for tensor in carried) if carried else (0, 0)
    h = torch.tanh(x + state_before)
    d = h.shape[1]
    semantic_maps = [matcher.semantic(h) + map_before]
    for t in range(matcher.iterations):
        cell = matcher.cells[t if len(matcher.cells) > 1 else 0]
        wx = cell.input_pointwise(cell.input_depthwise(x))
        g = [semantic_maps[-1].softmax(dim=1)] if matcher.guidance else []
        u = cell.gates_pointwise(cell.gates_depthwise(torch.cat([h, *g], dim=1)))
        z = torch.sigmoid(wx[:, :d] + u[:, :d])
        r = torch.sigmoid(wx[:, d : 2 * d] + u[:, d:])
        n = torch.tanh(wx[:, 2 * d :] + cell.new_pointwise(cell.new_depthwise(torch.cat([r * h, *g], dim=1))))
        h = (1 - z) * h + z * n
        semantic_maps.append(matcher.semantic(h) + map_before)
    up = _bilinear(matcher.expand(h), f)
    if not matcher.relative:
        return f + up, semantic_maps, h
    c = f.shape[1]
    return f + up[:, :c] * f + size * up[:, c:], semantic_maps, h


def _bilinear(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def _matcher(channels: int = 7, **options: object) -> Matcher:
    """A matcher whose prompts are not zero."""
    torch.manual_seed(0)
    given = {"hidden": 8, "iterations": 3, "kernel": 3, "pool": 2, "share_weights": True, "guidance": True}
    matcher = Matcher(channels, CLASSES, **{**given, "relative": True, "supervised": True, **options})
    nn.init.normal_(matcher.expand.weight)
    return matcher


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("relative", [False, True])
def test_matcher_and_its_gradients_follow_the_equations(iterations, share_weights, guidance, pool, relative):
    options = {"iterations": iterations, "share_weights": share_weights, "guidance": guidance, "relative": relative}
    matcher = _matcher(pool=pool, **options).double()
    f = torch.randn(2, 7, 10, 13, dtype=torch.double, requires_grad=True)

    def gradients(y: Tensor, semantic_maps: list[Tensor]) -> list[Tensor]:
        loss = y.square().sum() + sum((t + 1) * m.square().sum() for t, m in enumerate(semantic_maps))
        return list(torch.autograd.grad(loss, [f, *matcher.parameters()]))

    y, semantic_maps = matcher(f), list(matcher.semantic_maps)
    expected, expected_maps, _ = _as_written(matcher, f)
    torch.testing.assert_close([y, *semantic_maps], [expected, *expected_maps])
    torch.testing.assert_close(gradients(y, semantic_maps), gradients(expected, expected_maps))


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_carried_state_and_map_follow_the_equations(pool):
    """Two gaps, the second at half the first's resolution; their working resolutions differ unless `pool` is 2."""
    first, second = _matcher(7, pool=4).double(), _matcher(5, pool=pool).double()
    hand_on([first, second])
    f, g = torch.randn(2, 7, 24, 32, dtype=torch.double), torch.randn(2, 5, 12, 16, dtype=torch.double)
    first(f)
    _, maps, state = _as_written(first, f)
    y, semantic_maps = second(g), list(second.semantic_maps)
    expected, expected_maps, _ = _as_written(second, g, (state, maps[-1]))
    torch.testing.assert_close([y, *semantic_maps], [expected, *expected_maps])
    assert second.received == [] and first.handed_on is second.received  # freed within the forward pass


def test_carried_gradient_reaches_the_previous_matcher():
    first, second = _matcher(), _matcher()
    hand_on([first, second])
    f = torch.randn(2, 7, 10, 13)
    first(f)
    second(f).sum().backward()
    assert first.reduce.weight.grad.ne(0).any()


@pytest.mark.parametrize("size", [1e-3, 40])
def test_relative_matcher_is_invariant_to_the_scale_of_maps(size):
    matcher, f = _matcher(), torch.randn(2, 7, 10, 13)
    torch.testing.assert_close(matcher(size * f) / size, matcher(f))
    assert not torch.allclose(matcher(f), f, atol=0.1)
    plain = _matcher(relative=False)
    assert not torch.allclose(plain(size * f) / size, plain(f), atol=0.1)


def test_relative_matcher_keeps_a_map_of_zeros_and_its_gradient_finite():
    zeros = torch.zeros(1, 7, 4, 4, requires_grad=True)
    y = _matcher()(zeros)
    y.sum().backward()
    assert y.abs().max() < 1e-5 and zeros.grad.isfinite().all()


OPTIONS = {"hidden": 32, "iterations": 3, "kernel": 3, "share_weights": True, "guidance": True, "supervised": True}


def test_matcher_count_is_that_of_a_hand_count():
    """C = 24, K = 6, d = 32, k = 3, guided, shared cell: see the layers of `Matcher`."""
    reduce, semantic, expand = 24 * 32 + 32, 32 * 6 + 6, 32 * 24 + 24
    inputs = 32 * 9 + 32 * 96 + 96
    recurrent = 2 * (38 * 9) + 38 * 64 + 38 * 32
    plain = matcher_parameters(24, 6, relative=False, **OPTIONS)
    assert plain == reduce + semantic + expand + inputs + recurrent
    module = Matcher(24, 6, pool=4, relative=False, **OPTIONS)
    assert sum(parameter.numel() for parameter in module.parameters()) == plain
    assert matcher_parameters(24, 6, relative=True, **OPTIONS) == plain + expand


ABLATIONS: list[dict[str, Any]] = [
    {"hidden": 8, "kernel": 5},
    {"iterations": 1},
    {"iterations": 4, "share_weights": False},
    {"share_weights": False},
    {"guidance": False},
    {"auxiliary": 0},
    {"guidance": False, "auxiliary": 0},
    {"carry": False},
    {"carry": False, "auxiliary": 0},
    {"relative": False},
    {"gaps": "1,3"},
    {"gaps": "2"},
    {"working_stride": 4},
    {"working_stride": 64},
]
NETWORKS = ["resnet10t", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("settings", [{}, *ABLATIONS], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_closed_form_holds_in_every_ablation(settings, name):
    assert train(segmenter("spm", name, **settings)) == set()  # its count is checked on building


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_ablation_starts_as_the_frozen_backbone_and_then_differs_from_the_default(settings, name):
    frozen, default, ablated = segmenter("linear", name), segmenter("spm", name), segmenter("spm", name, **settings)
    assert close(logits(ablated), logits(frozen))
    for network in (default, ablated):
        train(network)
    assert not torch.equal(logits(ablated), logits(default))


@pytest.mark.parametrize("name", NETWORKS)
def test_carrying_changes_outputs_once_trained(name):
    """At equal weights: `carry` has no parameter of its own."""
    carrying, apart = segmenter("spm", name), segmenter("spm", name, carry=False)
    assert torch.equal(logits(carrying), logits(apart))  # the prompts are zero
    train(carrying)
    apart.load_trained_state(carrying.trained_state())
    assert not close(logits(carrying), logits(apart))


@pytest.mark.parametrize("name", NETWORKS)
def test_carrying_is_exact_behind_the_frozen_prefix(name):
    network = segmenter("spm", name)
    train(network)
    expected, images = logits(network), batch()[0]
    with torch.no_grad():
        assert torch.equal(network(network.backbone.prefix(images, 1)), expected)


def test_nothing_is_carried_from_one_forward_pass_to_another():
    network = segmenter("spm", "resnet10t")
    train(network)
    expected = logits(network)
    other = torch.randn(1, 3, 96, 96)
    hook = network.backbone.stages[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network(other)  # ends after two gaps: the second's state waits for the third
    hook.remove()
    assert torch.equal(logits(network), expected)


def test_copies_do_not_share_carried_state():
    network = segmenter("spm", "resnet10t")
    train(network)
    network.train().backbone(batch()[0])  # without a loss: its semantic maps are waiting
    copied = copy.deepcopy(network)
    expected = logits(network)
    assert all(matcher.semantic_maps == [] for matcher in copied.backbone.gaps.values())
    assert torch.equal(logits(copied), expected)
    disturb(copied)
    assert not close(logits(copied), expected) and torch.equal(logits(network), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_traced_network_carries(name, tmp_path):
    network = segmenter("spm", name)
    train(network)
    expected = logits(network)
    with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(network, batch()[0], check_trace=False), tmp_path / "traced.pt")
    other = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        loaded = torch.jit.load(tmp_path / "traced.pt")
        assert close(loaded(batch()[0]), expected) and close(loaded(other), network(other))


@pytest.mark.parametrize("iterations", [1, 3])
def test_supervision_of_the_last_state_reaches_the_last_cell(iterations):
    network = segmenter("spm", "resnet10t", iterations=iterations, share_weights=False, gaps="2").train()
    images, masks = batch()
    network.backbone(images)
    network.method.auxiliary_loss(masks).backward()
    (matcher,) = network.backbone.gaps.values()
    assert all(p.grad is not None and p.grad.ne(0).any() for p in matcher.cells[-1].parameters())
    assert all(p.grad is None or not p.grad.any() for p in matcher.expand.parameters())


def test_classifiers_are_head_parameters():
    network = segmenter("spm", "resnet10t")
    expected = [p for name, p in network.named_parameters() if ".semantic." in name]
    assert len(expected) == 6 and set(network.method.head_parameters()) == set(expected)
    assert list(segmenter("spm", "resnet10t", guidance=False, auxiliary=0).method.head_parameters()) == []
    assert list(segmenter("linear", "resnet10t").method.head_parameters()) == []


def test_missing_gap_is_unsupported_with_the_reason():
    with pytest.raises(UnsupportedMethod, match="gap 4 does not exist: there are 3 gaps between 4 stages"):
        segmenter("spm", "resnet10t", gaps="1,4")


def test_even_kernel_is_refused_and_gaps_are_sorted():
    hyperparameters = methods.get("spm").Hyperparameters
    with pytest.raises(UserError, match="kernel 4: even; only odd kernels"):
        hyperparameters.parse("spm", {"kernel": "4"})
    assert hyperparameters.parse("spm", {"gaps": "3,1,1"}).gaps == "1,3"


def test_last_stage_has_no_matcher():
    assert sorted(segmenter("spm", "resnet10t").backbone.gaps) == ["0", "1", "2"]


def test_pooling_and_upsampling_commute_with_1x1_convolutions():
    torch.manual_seed(0)
    convolution, x = nn.Conv2d(6, 4, 1), torch.randn(1, 6, 10, 14)
    pooled = F.avg_pool2d(x, 4, ceil_mode=True, count_include_pad=False)
    after = F.avg_pool2d(convolution(x), 4, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(convolution(pooled), after)
    small = torch.randn(1, 6, 3, 4)
    up = {"size": (10, 14), "mode": "bilinear", "align_corners": False}
    torch.testing.assert_close(convolution(F.interpolate(small, **up)), F.interpolate(convolution(small), **up))


def test_map_smaller_than_the_pooling_works():
    network = segmenter("spm", "resnet10t", working_stride=256).eval()
    assert network(torch.randn(1, 3, 32, 32)).shape[1] == CLASSES


def test_auxiliary_loss_is_the_weighted_mean_of_all_semantic_maps():
    network = segmenter("spm", "resnet10t", auxiliary=0.6, iterations=2).train()
    images, masks = batch()
    network.backbone(images)
    maps = [list(matcher.semantic_maps) for matcher in network.backbone.gaps.values()]
    assert [len(of_a_matcher) for of_a_matcher in maps] == [3, 3, 3]
    each = [cross_entropy(m, labels_at(masks, m.shape[-2:])) for of_a_matcher in maps for m in of_a_matcher]
    torch.testing.assert_close(network.method.auxiliary_loss(masks), 0.6 / 3 * sum(each))
    assert network.method.auxiliary_loss(masks) is None  # the maps are freed


@pytest.mark.parametrize("guidance", [True, False])
def test_no_auxiliary_loss_without_its_weight_or_in_evaluation(guidance):
    images, masks = batch()
    for network in (
        segmenter("spm", "resnet10t", guidance=guidance, auxiliary=0).train(),
        segmenter("spm", "resnet10t", guidance=guidance).eval(),
    ):
        network.backbone(images)
        assert all(matcher.semantic_maps == [] for matcher in network.backbone.gaps.values())
        assert network.method.auxiliary_loss(masks) is None


def _peak_bytes(method: str, name: str) -> int:
    with torch.device("meta"):
        backbone = cut(name, create(name))
    built = methods.get(method)
    network = build_segmenter(backbone, built(built.Hyperparameters()), "fpn", CLASSES, seed=0)
    return step_cost(network, Budget(name="one", steps=1, batch_size=1, crop=(512, 512))).peak_bytes


@pytest.mark.parametrize(
    "name",
    ["resnet50", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("resnet101", "vit_base_patch16_224"))],
)
def test_step_needs_less_memory_than_full_fine_tuning(name):
    """At 512×512, one image, as an allocator would count it; on shapes alone."""
    assert _peak_bytes("spm", name) < 0.6 * _peak_bytes("full", name)
