"""Resampling by matrix products, as on a GPU, gives what torch's kernels give on a CPU, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness.models import resampling
from harness.models.heads import build_head
from tests.support.tiny_methods import backbone

SIZES = [((7, 9), (28, 36)), ((16, 16), (33, 17)), ((1, 5), (4, 5)), ((12, 8), (5, 3)), ((6, 6), (6, 6))]


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize(
    ("kind", "antialias"), [("bilinear", False), ("bilinear", True), ("bicubic", True), ("average", False)]
)
def test_products_equal_the_kernel(
    kind: resampling.Interpolation, antialias: bool, old: tuple[int, int], new: tuple[int, int]
) -> None:
    maps = torch.randn(2, 3, *old, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(2, 3, *new, dtype=torch.float64)
    found = []
    for form in (resampling._by_products, resampling._by_kernel):
        output = form(maps, new, kind, antialias)
        (gradient,) = torch.autograd.grad((output * towards).sum(), maps)
        found.append((output.detach(), gradient))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_made_in_inference_serve_training() -> None:
    resampling._weights.cache_clear()
    with torch.inference_mode():
        resampling._by_products(torch.randn(1, 1, 4, 4), (8, 8), "bilinear", False)
    maps = torch.randn(1, 1, 4, 4, requires_grad=True)
    resampling._by_products(maps, (8, 8), "bilinear", False).sum().backward()
    assert maps.grad is not None


def test_logits_keep_float32_under_autocast() -> None:
    maps = torch.randn(1, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = resampling._by_products(maps, (8, 8), "bilinear", False)
    torch.testing.assert_close(ours, F.interpolate(maps, (8, 8), mode="bilinear"))


def test_heads_resize_and_pool_by_products() -> None:
    head = build_head("uper:8", backbone("resnet10t"), 3, seed=0)
    assert not [part for part in head.modules() if isinstance(part, nn.AdaptiveAvgPool2d)]
    from mmseg.models.utils import resize

    maps = torch.randn(1, 2, 4, 4)
    assert isinstance(resize.__globals__["F"], resampling._Functional)
    torch.testing.assert_close(resize(maps, (8, 8), mode="bilinear"), F.interpolate(maps, (8, 8), mode="bilinear"))
    torch.testing.assert_close(resize(maps, scale_factor=2.0), F.interpolate(maps, scale_factor=2.0))
