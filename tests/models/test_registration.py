"""Prediction and image register to the pixel, for every family, at image sizes that are no multiple of anything."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.data.base import IGNORE_INDEX
from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.families import tiny_networks
from harness.models.heads import build_head
from harness.models.losses import cross_entropy
from harness.models.network import Segmenter
from tests.support.oracle import attainable, batch, miou, oracle_network, picture, predictor, world
from tests.support.tiny_methods import backbone

TINY = {family: tiny.name for family, tiny in tiny_networks().items()}
SIZES = {(180, 240): 3, (97, 131): 3, (224, 224): 2, (360, 480): 1}
"""Height and width of images, and how many of them: the smaller they are the more, for a steady mIoU."""
WORLDS = [world(seed) for seed in range(3)]
CNN, VIT, ROTARY = TINY["resnet"], TINY["vision_transformer"], TINY["eva"]


@functools.lru_cache(maxsize=2)
def network(name: str, head: str) -> Segmenter:
    return oracle_network(name, head)


def labels_of(size: tuple[int, int], count: int = 3) -> list[Tensor]:
    return [one[: size[0], : size[1]] for one in WORLDS[:count]]


def score(network: Segmenter, size: tuple[int, int], count: int = 3, shift: int = 0, **options: object) -> float:
    """mIoU in per cent of the product's predictions from an oracle that is off by `shift` pixels."""
    network.head.shift = shift
    labels = labels_of(size, count)
    return miou(predictor(network, **options)([picture(one) for one in labels]), labels)


def cell(backbone: StagedBackbone, head: str) -> float:
    """Pixels of the image per cell of the head's output."""
    if head == "linear":
        return backbone.strides[-1]
    return backbone.strides[0] if backbone.hierarchical else backbone.strides[0] / 4


@pytest.mark.parametrize(
    ("name", "head"),
    [
        pytest.param(name, head, marks=[pytest.mark.exhaustive] if long else [], id=f"{family}-{head}")
        for family, name in TINY.items()
        for head, long in (("linear", False), ("fpn:8", name not in (CNN, VIT, ROTARY)))
    ],
)
def test_oracle_scores_what_resampling_allows(name: str, head: str) -> None:
    oracle = network(name, head)
    for size, count in SIZES.items():
        reached = score(oracle, size, count)
        assert reached >= attainable(WORLDS[:count], cell(oracle.backbone, head), size) - 1, size
        if count == 3:
            assert score(oracle, size, shift=8) < reached - 3, size


@pytest.mark.parametrize("name", [CNN, VIT, ROTARY])
def test_windows_register(name: str) -> None:
    """Windows of no multiple, at offsets of none, three together in a batch."""
    oracle, sliding = network(name, "fpn:8"), {"evaluation": "slide", "crop": (97, 131), "stride": (61, 83)}
    for size in ((180, 240), (90, 240)):
        reached = score(oracle, size, **sliding)
        assert reached >= attainable(WORLDS, cell(oracle.backbone, "fpn:8"), size) - 1
        assert score(oracle, size, shift=8, **sliding) < reached - 3


def test_prediction_registers_where_images_are_resized_for_the_network() -> None:
    oracle = network(VIT, "linear")
    labels = [torch.from_numpy(np.kron(one.numpy(), np.ones((2, 2), np.uint8))) for one in labels_of((97, 131))]
    reached = miou(predictor(oracle, scale=(97, 131))([picture(one) for one in labels]), labels)
    assert reached >= attainable(WORLDS, oracle.backbone.strides[-1], (97, 131)) - 1


@pytest.mark.parametrize("name", [CNN, VIT, ROTARY])
def test_training_loss_and_evaluation_have_the_same_logits(name: str) -> None:
    oracle = network(name, "linear")
    images, masks = batch(labels_of((97, 131)), oracle.backbone)
    masks[:, :5] = IGNORE_INDEX
    seen = []
    oracle.method.auxiliary_loss = lambda masks: seen.append(masks)
    oracle.head.shift = 0
    loss, logits = oracle(images, masks)
    predicted = oracle.image_logits(logits, (97, 131))
    assert predicted.shape[-2:] == (97, 131)
    torch.testing.assert_close(loss, cross_entropy(predicted, masks))
    (canvas,) = seen
    height, width = oracle.backbone.canvas((97, 131))
    assert torch.equal(canvas, F.pad(masks, (0, width - 131, 0, height - 97), value=IGNORE_INDEX))
    oracle.head.shift = 8
    assert oracle(images, masks)[0] > loss
    del oracle.method.auxiliary_loss


@pytest.mark.parametrize("name", TINY.values(), ids=TINY)
def test_maps_lie_where_their_pixels_are(name: str) -> None:
    """A change of the image's last pixels, beside the padding, changes the finest map's cells there most."""
    frozen = oracle_network(name, "linear").backbone
    frozen.stem._forward_pre_hooks.clear()
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 97, 131, generator=draw)
    changed = images.clone()
    changed[..., 64:, 96:] += 3 * torch.randn(1, 3, 33, 35, generator=draw)
    with torch.no_grad():
        before, after = frozen(images), frozen(changed)
    for one, stride in zip(before, frozen.strides, strict=True):
        assert tuple(side * stride for side in one.shape[-2:]) == frozen.canvas((97, 131))
    change, stride = (before[0] - after[0]).abs().mean(1)[0], frozen.strides[0]
    place = change[64 // stride : 97 // stride, 96 // stride : 131 // stride].mean()
    assert place > 2 * change[: 48 // stride].mean() and place > 2 * change[:, : 80 // stride].mean()


@pytest.mark.parametrize("head", ["fpn:8", "uper:8"])
def test_pyramid_of_an_odd_grid_is_halved_exactly_and_cut_back(head: str) -> None:
    frozen = backbone("vit_tiny_patch16_224")
    module = build_head(head, frozen, 3, seed=0).eval()
    levels: list[Tensor] = []
    module[0].register_forward_hook(lambda module, inputs, output: levels.extend(output))
    images = torch.randn(1, 3, 80, 112)
    logits = module(frozen(images))
    assert [tuple(level.shape[-2:]) for level in levels] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    assert logits.shape == (1, 3, 20, 28)
