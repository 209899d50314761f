"""SPM: what a matcher computes, its ablations, and the memory of a step compared with full fine-tuning."""

from __future__ import annotations

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
from methods.modules.spm import Matcher, matcher_parameters
from tests.support.tiny_methods import CLASSES, batch, segmenter, train


def _as_written(matcher: Matcher, f: Tensor) -> tuple[Tensor, list[Tensor]]:
    """f + p and m_1 .. m_T, equation by equation as in the docstrings of `Matcher` and `SeparableGRUCell`."""
    seen = f.detach() if matcher.relative else f
    pooled = F.avg_pool2d(seen, matcher.pool, ceil_mode=True, count_include_pad=False)
    size = pooled.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    x = matcher.reduce(pooled / size if matcher.relative else pooled)
    h, semantic_maps = torch.tanh(x), []
    d = h.shape[1]
    for t in range(matcher.iterations):
        cell = matcher.cells[t if len(matcher.cells) > 1 else 0]
        wx = cell.input_pointwise(cell.input_depthwise(x))
        semantic_maps.append(matcher.semantic(h))
        g = [semantic_maps[-1].softmax(dim=1)] if matcher.guidance else []
        u = cell.gates_pointwise(cell.gates_depthwise(torch.cat([h, *g], dim=1)))
        z = torch.sigmoid(wx[:, :d] + u[:, :d])
        r = torch.sigmoid(wx[:, d : 2 * d] + u[:, d:])
        n = torch.tanh(wx[:, 2 * d :] + cell.new_pointwise(cell.new_depthwise(torch.cat([r * h, *g], dim=1))))
        h = (1 - z) * h + z * n
    up = F.interpolate(matcher.expand(h), f.shape[-2:], mode="bilinear", align_corners=False)
    if not matcher.relative:
        return f + up, semantic_maps
    c = f.shape[1]
    return f + up[:, :c] * f + size * up[:, c:], semantic_maps


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("relative", [False, True])
def test_matcher_and_its_gradients_follow_the_equations(iterations, share_weights, guidance, pool, relative):
    torch.manual_seed(0)
    matcher = Matcher(7, CLASSES, 8, iterations, 3, pool, share_weights, guidance, relative).double()
    nn.init.normal_(matcher.expand.weight)
    f = torch.randn(2, 7, 10, 13, dtype=torch.double, requires_grad=True)

    def gradients(y: Tensor, semantic_maps: list[Tensor]) -> list[Tensor]:
        loss = y.square().sum() + sum((t + 1) * m.square().sum() for t, m in enumerate(semantic_maps))
        return list(torch.autograd.grad(loss, [f, *matcher.parameters()]))

    y, semantic_maps = matcher(f), matcher.semantic_maps
    expected, expected_maps = _as_written(matcher, f)
    torch.testing.assert_close([y, *semantic_maps], [expected, *expected_maps])
    torch.testing.assert_close(gradients(y, semantic_maps), gradients(expected, expected_maps))


@pytest.mark.parametrize("size", [1e-3, 40])
def test_relative_matcher_is_invariant_to_the_scale_of_maps(size):
    torch.manual_seed(0)
    matcher = Matcher(7, CLASSES, 8, 3, 3, 2, True, True, relative=True)
    nn.init.normal_(matcher.expand.weight)
    f = torch.randn(2, 7, 10, 13)
    torch.testing.assert_close(matcher(size * f) / size, matcher(f))
    assert not torch.allclose(matcher(f), f, atol=0.1)


def test_relative_matcher_keeps_a_map_of_zeros():
    zeros = torch.zeros(1, 7, 4, 4, requires_grad=True)
    y = Matcher(7, CLASSES, 8, 3, 3, 2, True, True, relative=True)(zeros)
    y.sum().backward()
    assert torch.equal(y, zeros) and zeros.grad.isfinite().all()


def test_matcher_count_is_that_of_a_hand_count():
    """C = 24, K = 6, d = 32, k = 3, guided, shared cell: see the layers of `Matcher`."""
    reduce, semantic, expand = 24 * 32 + 32, 32 * 6 + 6, 32 * 24 + 24
    inputs = 32 * 9 + 32 * 96 + 96
    recurrent = 2 * (38 * 9) + 38 * 64 + 38 * 32
    options = {"hidden": 32, "iterations": 3, "kernel": 3, "share_weights": True, "guidance": True}
    assert matcher_parameters(24, 6, **options) == reduce + semantic + expand + inputs + recurrent
    module = Matcher(24, 6, pool=4, **options)
    assert sum(parameter.numel() for parameter in module.parameters()) == matcher_parameters(24, 6, **options)
    assert matcher_parameters(24, 6, relative=True, **options) == matcher_parameters(24, 6, **options) + expand


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
def test_closed_form_holds_in_every_ablation(settings, name):
    assert train(segmenter("spm", name, **settings)) == set()  # its count is checked on building


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


def test_auxiliary_loss_is_the_weighted_sum_of_all_refinements():
    network = segmenter("spm", "resnet10t", auxiliary=0.6, iterations=2).train()
    images, masks = batch()
    network(images, masks)
    matchers = list(network.backbone.gaps.values())
    assert [len(matcher.semantic_maps) for matcher in matchers] == [2, 2, 2]
    each = [cross_entropy(m, labels_at(masks, m.shape[-2:])) for matcher in matchers for m in matcher.semantic_maps]
    torch.testing.assert_close(network.method.auxiliary_loss(masks), 0.6 / 2 * sum(each))


def test_evaluation_keeps_no_semantic_maps():
    network = segmenter("spm", "resnet10t").eval()
    network(batch()[0])
    assert all(matcher.semantic_maps == [] for matcher in network.backbone.gaps.values())


def _peak_bytes(method: str, name: str) -> int:
    with torch.device("meta"):
        backbone = cut(name, create(name))
    built = methods.get(method)
    network = build_segmenter(backbone, built(built.Hyperparameters()), "fpn", CLASSES, seed=0)
    return step_cost(network, Budget(name="one", steps=1, batch_size=1, crop=(512, 512))).peak_bytes


@pytest.mark.parametrize("name", ["resnet101", pytest.param("vit_base_patch16_224", marks=pytest.mark.exhaustive)])
def test_step_needs_less_memory_than_full_fine_tuning(name):
    """At 512×512, one image, as an allocator would count it; on shapes alone."""
    assert _peak_bytes("spm", name) < 0.6 * _peak_bytes("full", name)
