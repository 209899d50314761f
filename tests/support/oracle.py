"""An oracle: a head that knows the labels, for tests of how predictions and images register.

Labels are drawn as colours into the image, so the oracle sees what the backbone sees, its padding included. Where the
oracle's cells lie is the map's claim: it averages the labels over the cells of the map, each `stride` pixels wide.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.contract.cases import Case
from harness.data.augmentation import prepare
from harness.engine.evaluation import Predictor, confusion
from harness.method import methods
from harness.models.backbones.backbone import StagedBackbone
from harness.models.network import Segmenter, build_segmenter
from harness.runs.metrics import metrics
from harness.spec import Budget

PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]], np.uint8)
CLASSES = len(PALETTE)
WORLD = (448, 672)
"""Height and width, multiples of every stride up to 32 and of 14, so that nothing is padded."""


@functools.cache
def world(seed: int) -> Tensor:
    """Labels [448, 672]: overlapping rectangles of 16 to 120 pixels a side, all covered."""
    draw = np.random.default_rng(seed)
    labels = np.zeros(WORLD, np.uint8)
    for _ in range(400):
        height, width = draw.integers(16, 120, 2)
        top, left = draw.integers(-60, WORLD[0]), draw.integers(-60, WORLD[1])
        labels[max(top, 0) : top + height, max(left, 0) : left + width] = draw.integers(CLASSES)
    return torch.from_numpy(labels)


def picture(labels: Tensor) -> np.ndarray:
    """The labels as an image [H, W, 3]."""
    return PALETTE[labels.numpy()]


class Oracle(nn.Module):
    """The maps -> the share of each class in each cell, [B, K, h, w], the labelled pixels of a cell being one.

    As large as the output of `head`, which it stands in for.
    """

    def __init__(self, head: nn.Module, backbone: StagedBackbone, shift: int = 0):
        """`shift`: pixels by which the labels are moved down and to the right before."""
        super().__init__()
        self.head, self.shift = head, shift
        self.strides = backbone.strides
        colours = torch.from_numpy(PALETTE).float() / 255
        mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
        self.register_buffer("colours", (colours - mean) / std)
        backbone.stem.register_forward_pre_hook(self._look)

    def _look(self, stem: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pixels = inputs[0].permute(0, 2, 3, 1)[..., None, :]
        distances = (pixels - self.colours).square().sum(-1)
        known = (distances.amin(-1) < 0.5)[:, None]  # the mean colour of the padding is far from every class
        onehot = F.one_hot(distances.argmin(-1), CLASSES).permute(0, 3, 1, 2) * known
        self.labels = onehot.float().roll((self.shift, self.shift), (2, 3))

    def forward(self, maps: list[Tensor]) -> Tensor:
        logits = self.head(maps)
        stage = 0 if logits.shape[-1] >= maps[0].shape[-1] else -1
        height, width = (cells * self.strides[stage] for cells in maps[stage].shape[-2:])
        labels = F.pad(self.labels, (0, width - self.labels.shape[-1], 0, height - self.labels.shape[-2]))
        shares = F.adaptive_avg_pool2d(labels, logits.shape[-2:])
        return shares / shares.sum(1, keepdim=True).clamp(min=1e-6)


def oracle_network(backbone: str, head: str, shift: int = 0, method: str = "linear") -> Segmenter:
    """The contract's tiny network of the name, its head replaced by an oracle of the same output size."""
    chosen = methods.get(method)
    frozen = Case(chosen, backbone).frozen_backbone()
    network = build_segmenter(frozen, chosen(chosen.Hyperparameters()), head, CLASSES, seed=0)
    network.head = Oracle(network.head, network.backbone, shift)
    return network.eval()


def predictor(network: Segmenter, scale: tuple[int, int] | None = None, **budget: Any) -> Predictor:
    fields = {"name": "oracle", "steps": 1, "batch_size": 3, "crop": (64, 64), **budget}
    backbone = network.backbone
    return Predictor(network, backbone.mean, backbone.std, scale, Budget(**fields), torch.device("cpu"))


def miou(predictions: list[Tensor], labels: list[Tensor]) -> float:
    """Per cent, over all images together."""
    matrices = [confusion(one, other, CLASSES) for one, other in zip(predictions, labels, strict=True)]
    found = metrics(torch.stack(matrices).sum(0).numpy()).miou
    assert found is not None
    return 100 * found


def attainable(labels: list[Tensor], stride: float, size: tuple[int, int]) -> float:
    """What resampling alone allows, where nothing is padded: mIoU of the upper left `size` of whole worlds that were
    averaged over cells of `stride` pixels and upsampled again."""
    predictions = []
    for one in labels:
        onehot = F.one_hot(one.long(), CLASSES).permute(2, 0, 1)[None].float()
        cells = F.adaptive_avg_pool2d(onehot, [round(side / stride) for side in WORLD])
        back = F.interpolate(cells, WORLD, mode="bilinear", align_corners=False)
        predictions.append(back[0].argmax(0).byte()[: size[0], : size[1]])
    return miou(predictions, [one[: size[0], : size[1]] for one in labels])


def batch(labels: list[Tensor], backbone: StagedBackbone) -> tuple[Tensor, Tensor]:
    """Normalised images [B, 3, H, W] and masks [B, H, W] of labels of one size."""
    images = [torch.from_numpy(prepare(picture(one), None, backbone.mean, backbone.std)) for one in labels]
    return torch.stack(images), torch.stack(labels)
