"""What SPM's matcher computes, and what a step of SPM holds in memory against one of full fine-tuning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.engine.cost import step_cost
from harness.method import methods
from harness.models.backbones.families import create, cut
from harness.models.network import build_segmenter
from harness.spec import Budget
from methods.modules.matcher import Matcher

CLASSES = 5


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
def test_a_matcher_and_its_gradients_are_those_of_the_equations(iterations, share_weights, guidance, pool, relative):
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
def test_a_relative_matcher_does_not_see_how_large_the_maps_of_a_network_are(size):
    torch.manual_seed(0)
    matcher = Matcher(7, CLASSES, 8, 3, 3, 2, True, True, relative=True)
    nn.init.normal_(matcher.expand.weight)
    f = torch.randn(2, 7, 10, 13)
    torch.testing.assert_close(matcher(size * f) / size, matcher(f))
    assert not torch.allclose(matcher(f), f, atol=0.1)


def test_a_relative_matcher_passes_a_map_of_zeros():
    zeros = torch.zeros(1, 7, 4, 4, requires_grad=True)
    y = Matcher(7, CLASSES, 8, 3, 3, 2, True, True, relative=True)(zeros)
    y.sum().backward()
    assert torch.equal(y, zeros) and zeros.grad.isfinite().all()


def _peak_bytes(method: str, name: str) -> int:
    with torch.device("meta"):
        backbone = cut(name, create(name))
    built = methods.get(method)
    network = build_segmenter(backbone, built(built.Hyperparameters()), "fpn", CLASSES, seed=0)
    return step_cost(network, Budget(name="one", steps=1, batch_size=1, crop=(512, 512))).peak_bytes


@pytest.mark.parametrize("name", ["resnet101", pytest.param("vit_base_patch16_224", marks=pytest.mark.exhaustive)])
def test_a_step_holds_under_60_percent_of_what_one_of_full_fine_tuning_does(name):
    """At 512×512, one image, as an allocator would count it; on shapes alone."""
    assert _peak_bytes("spm", name) < 0.6 * _peak_bytes("full", name)
