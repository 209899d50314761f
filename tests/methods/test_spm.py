"""What SPM's matcher computes, and what a step of SPM holds in memory against one of full fine-tuning."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.backbones.families import create, cut
from harness.method import methods
from harness.network import build_segmenter
from harness.training import parameter_groups
from methods.modules.matcher import Matcher

CLASSES = 5


def _as_written(matcher: Matcher, f: Tensor) -> tuple[Tensor, list[Tensor]]:
    """f + p and m_1 .. m_T, equation by equation as in the docstrings of `Matcher` and `SeparableGRUCell`."""
    x = matcher.reduce(F.avg_pool2d(f, matcher.pool, ceil_mode=True, count_include_pad=False))
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
    return f + up, semantic_maps


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("pool", [1, 3])
def test_a_matcher_and_its_gradients_are_those_of_the_equations(iterations, share_weights, guidance, pool):
    torch.manual_seed(0)
    matcher = Matcher(7, CLASSES, 8, iterations, 3, pool, share_weights, guidance).double()
    nn.init.normal_(matcher.expand.weight)
    f = torch.randn(2, 7, 10, 13, dtype=torch.double, requires_grad=True)

    def gradients(y: Tensor, semantic_maps: list[Tensor]) -> list[Tensor]:
        loss = y.square().sum() + sum((t + 1) * m.square().sum() for t, m in enumerate(semantic_maps))
        return list(torch.autograd.grad(loss, [f, *matcher.parameters()]))

    y, semantic_maps = matcher(f), matcher.semantic_maps
    expected, expected_maps = _as_written(matcher, f)
    torch.testing.assert_close([y, *semantic_maps], [expected, *expected_maps])
    torch.testing.assert_close(gradients(y, semantic_maps), gradients(expected, expected_maps))


class _Held(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes until it is freed, on tensors without data as well."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._freed(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def _peak_bytes(method: str, name: str) -> int:
    """The most that two training steps hold at once: weights, gradients, what AdamW keeps, activations."""
    with torch.device("meta"):
        backbone = cut(name, create(name))
    built = methods.get(method)
    network = build_segmenter(backbone, built(built.Hyperparameters()), "fpn", CLASSES, seed=0).to("meta").train()
    groups = parameter_groups(network, network.method.hyperparameters)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=False)
    images = torch.empty(1, 3, 512, 512, device="meta")
    masks = torch.zeros(1, 512, 512, dtype=torch.uint8, device="meta")
    with _Held([*network.parameters(), *network.buffers()]) as held:
        for _ in range(2):
            loss, _ = network(images, masks)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return held.peak


@pytest.mark.parametrize("name", ["resnet101", pytest.param("vit_base_patch16_224", marks=pytest.mark.exhaustive)])
def test_a_step_holds_under_60_percent_of_what_one_of_full_fine_tuning_does(name):
    """At 512×512, one image, as an allocator would count it; on shapes alone."""
    assert _peak_bytes("spm", name) < 0.6 * _peak_bytes("full", name)
