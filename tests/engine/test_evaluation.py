"""Metrics against mmsegmentation's own; every way of predicting counts the same pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.data.base import IGNORE_INDEX, Pair, Sample, SegmentationDataset, Split, WorkingSizes
from harness.engine.evaluation import Predictor, confusion, confusion_matrices, most_likely
from harness.models.losses import upsample
from harness.runs.metrics import load_confusions, metrics, save_confusions
from harness.spec import Budget
from harness.util.quiet import quiet_imports

with quiet_imports():
    from mmseg.evaluation.metrics import IoUMetric


def maps(
    seed: int, classes: int, absent: Sequence[int] = (), size: tuple[int, int] = (13, 17)
) -> tuple[Tensor, Tensor]:
    """Prediction and mask at random, a tenth of it ignored; classes in `absent` are in neither."""
    draw = np.random.default_rng(seed)
    there = np.setdiff1d(np.arange(classes), absent)
    prediction, mask = draw.choice(there, size), draw.choice(there, size)
    mask[draw.random(size) < 0.1] = IGNORE_INDEX
    return torch.from_numpy(prediction.astype(np.uint8)), torch.from_numpy(mask.astype(np.uint8))


# Confusion matrices and metrics


def test_metrics_of_a_two_by_two_matrix() -> None:
    # Labels: 6 of class 0 and 4 of class 1. Predicted: 7 and 3.
    found = metrics(np.array([[5, 1], [2, 2]]))
    assert found.iou == pytest.approx((5 / (6 + 7 - 5), 2 / (4 + 3 - 2)))
    assert found.acc == pytest.approx((5 / 6, 2 / 4))
    assert found.dice == pytest.approx((10 / 13, 4 / 7))
    assert found.miou == pytest.approx((5 / 8 + 2 / 5) / 2)
    assert found.aacc == pytest.approx(7 / 10)
    assert found.absent == 0


def test_confusion_has_labels_as_rows_and_skips_ignored_pixels() -> None:
    mask = torch.tensor([[0, 1], [1, IGNORE_INDEX]], dtype=torch.uint8)
    prediction = torch.tensor([[1, 1], [0, 1]], dtype=torch.uint8)
    assert confusion(prediction, mask, 2).tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("classes", [2, 19, IGNORE_INDEX])
def test_confusion_counts_every_pair_of_labels(classes: int) -> None:
    prediction, mask = maps(0, classes)
    assert (mask == IGNORE_INDEX).any()
    expected = torch.zeros(classes, classes, dtype=torch.int64)
    for row, column in zip(mask.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if row != IGNORE_INDEX:
            expected[row, column] += 1
    assert torch.equal(confusion(prediction, mask, classes), expected)


def test_label_of_no_class_is_refused() -> None:
    mask = torch.tensor([[0, 2], [1, IGNORE_INDEX]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="labels that are neither below 2 nor 255"):
        confusion(torch.zeros_like(mask), mask, 2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_most_likely_class_is_the_first_of_equals_and_nan_above_all(memory_format: torch.memory_format) -> None:
    logits = torch.randint(0, 3, (2, 5, 7, 9)).float()  # most pixels have equal logits
    logits[0, 3, 2, 2] = logits[0, 1, 2, 2] = float("nan")
    found = most_likely(logits.contiguous(memory_format=memory_format))
    assert torch.equal(found, logits.argmax(1))
    assert found[0, 2, 2] == 1
    np.testing.assert_array_equal(found.numpy(), np.argmax(logits.numpy(), axis=1))


@pytest.mark.parametrize(("classes", "absent"), [(2, ()), (5, (3,)), (19, (0, 18)), (150, range(40, 150))])
def test_metrics_equal_those_of_mmsegmentation(classes: int, absent: Sequence[int]) -> None:
    pairs = [maps(seed, classes, absent) for seed in range(4)]
    areas = [IoUMetric.intersect_and_union(*pair, classes, IGNORE_INDEX) for pair in pairs]
    theirs = IoUMetric.total_area_to_metrics(
        *(sum(kind) for kind in zip(*areas, strict=True)), metrics=["mIoU", "mDice"]
    )
    ours = metrics(sum(confusion(*pair, classes) for pair in pairs).numpy())
    for per_class, name in ((ours.iou, "IoU"), (ours.acc, "Acc"), (ours.dice, "Dice")):
        np.testing.assert_allclose(np.array(per_class, float), theirs[name], rtol=1e-6)
    means = (np.nanmean(theirs[name]) for name in ("IoU", "Acc", "Dice"))
    assert (ours.miou, ours.macc, ours.mdice) == pytest.approx(tuple(means))
    assert ours.aacc == pytest.approx(float(theirs["aAcc"]))
    assert ours.absent == len(absent)


def test_class_that_is_only_predicted_scores_zero() -> None:
    found = metrics(np.array([[3, 1], [0, 0]]))
    assert (found.iou, found.acc) == ((0.75, 0.0), (0.75, None))
    assert (found.miou, found.macc, found.absent) == (0.375, 0.75, 0)


def test_metrics_without_labels_are_undefined() -> None:
    found = metrics(np.zeros((3, 3), np.int64))
    assert (found.miou, found.macc, found.aacc, found.mdice, found.absent) == (None, None, None, None, 3)


def test_large_counts_do_not_overflow() -> None:
    assert metrics(np.full((2, 2), 2**31, np.int64)).miou == pytest.approx(1 / 3)


def test_saved_confusions_load_unchanged(tmp_path: Path) -> None:
    matrices = np.stack([confusion(*maps(seed, 150), 150).numpy() for seed in range(3)])
    save_confusions(tmp_path / "c.npz", ["train/a", "b", "ü"], ["clip", "clip", "ä"], matrices)
    loaded = load_confusions(tmp_path / "c.npz")
    assert (loaded.names, loaded.groups) == (["train/a", "b", "ü"], ["clip", "clip", "ä"])
    assert loaded.matrices.dtype == np.int64
    np.testing.assert_array_equal(loaded.matrices, matrices)
    save_confusions(tmp_path / "none.npz", [], [], np.zeros((0, 4, 4), np.int64))
    assert load_confusions(tmp_path / "none.npz").matrices.shape == (0, 4, 4)


# Predicting


class Unpadded(nn.Module):
    """A network whose canvas is the image."""

    def image_logits(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return upsample(logits, size)


class Pixelwise(Unpadded):
    """Three logits a pixel, from that pixel alone; records the sizes of its inputs."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return (images * torch.tensor([1.0, -1.0, 0.5]).reshape(1, 3, 1, 1))[..., :: self.stride, :: self.stride]


def predictor(network: nn.Module, scale: tuple[int, int] | None = None, **budget: Any) -> Predictor:
    fields = {"name": "x", "steps": 1, "batch_size": 3, "crop": (8, 8), **budget}
    return Predictor(network, (0.5,) * 3, (0.25,) * 3, scale, Budget(**fields), torch.device("cpu"))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(8, 8), (20, 31), (9, 40), (5, 30), (30, 5), (3, 4), (1, 1)])
@pytest.mark.parametrize("stride", [(8, 8), (3, 5), (1, 1)])
def test_windows_predict_the_same_as_whole_images(size: tuple[int, int], stride: tuple[int, int]) -> None:
    images = [picture(*size), picture(*size, seed=1)]
    network = Pixelwise()
    slid = predictor(network, evaluation="slide", stride=stride)(images)
    assert all(height <= 8 and width <= 8 for *_, height, width in network.seen)
    whole = predictor(Pixelwise())(images)
    assert all(torch.equal(*pair) for pair in zip(slid, whole, strict=True))
    assert slid[0].shape == size
    assert slid[0].dtype == torch.uint8


class Window(Unpadded):
    """Class 1 in the middle of each window and class 0 at its rim."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 2, *images.shape[-2:])
        logits[:, 0] = 1
        logits[:, 1, 2:-2, 2:-2] = 5
        return logits


def test_overlapping_windows_are_averaged() -> None:
    labels = predictor(Window(), evaluation="slide", stride=(4, 4))([picture(12, 12)])[0]
    # Mean logits: 1 to 0 where all windows have their rim, 1 to at least 5/4 where one of up to four has its middle.
    assert labels[0].tolist() == [0] * 12
    assert labels[6, 2:10].tolist() == [1] * 8


@dataclass(frozen=True)
class InMemory(SegmentationDataset):
    """Pairs in memory, as test."""

    pairs: tuple[Pair, ...]
    scale: tuple[int, int] | None = None
    name: str = "in memory"
    classes: tuple[str, ...] = ("a", "b", "c")
    palette: tuple[tuple[int, int, int], ...] = ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    digest: str = "0"
    working_sizes: WorkingSizes = WorkingSizes((8, 8), (8, 8))

    def samples(self, split: Split) -> list[Sample]:
        return [Sample(str(number), "all", number) for number in range(len(self.pairs))]

    def load(self, sample: Sample) -> Pair:
        return self.pairs[sample.source]


def in_memory(sizes: Sequence[tuple[int, int]]) -> InMemory:
    return InMemory(
        tuple(Pair(picture(*size, seed=n), maps(n, 3, size=size)[1].numpy()) for n, size in enumerate(sizes))
    )


SIZES = [(8, 8), (8, 8), (8, 8), (8, 8), (6, 9), (8, 8), (7, 7), (7, 7)]


def test_batches_of_mixed_sizes_count_as_single_images() -> None:
    dataset, network = in_memory(SIZES), Pixelwise(stride=2)
    together = confusion_matrices(predictor(network), dataset, dataset.samples("test"))
    assert [shape[0] for shape in network.seen] == [3, 1, 1, 1, 2]
    single = confusion_matrices(predictor(network, batch_size=1), dataset, dataset.samples("test"))
    np.testing.assert_array_equal(together, single)
    labelled = [int((pair.mask != IGNORE_INDEX).sum()) for pair in dataset.pairs]
    assert together.sum((1, 2)).tolist() == labelled


def test_processes_count_each_image_once() -> None:
    dataset = in_memory(SIZES)
    alone = confusion_matrices(predictor(Pixelwise()), dataset, dataset.samples("test"))
    shares = [
        confusion_matrices(predictor(Pixelwise()), dataset, dataset.samples("test"), share=slice(r, None, 3))
        for r in range(3)
    ]
    for rank, share in enumerate(shares):
        np.testing.assert_array_equal(share, alone[rank::3])
    assert confusion_matrices(predictor(Pixelwise()), dataset, [], share=slice(2, None, 3)).shape == (0, 3, 3)


def test_predictions_are_counted_at_the_size_of_the_labels() -> None:
    blocks = np.kron(np.array([[0, 1], [2, 0]], np.uint8), np.ones((10, 10), np.uint8))
    image = np.array([[255, 128, 128], [128, 0, 128], [128, 128, 255]], np.uint8)[blocks]
    dataset, network = InMemory((Pair(image, blocks),), scale=(40, 40)), Pixelwise()
    matrices = confusion_matrices(predictor(network, scale=dataset.scale), dataset, dataset.samples("test"))
    assert network.seen == [(1, 3, 40, 40)]
    assert matrices.sum() == blocks.size
    assert metrics(matrices[0]).miou == 1


def test_evaluation_leaves_the_network_in_evaluation_mode() -> None:
    dataset, network = in_memory(SIZES[:1]), Pixelwise()
    network.norm = nn.BatchNorm2d(3)
    network.register_forward_hook(lambda module, inputs, logits: module.norm(logits))
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    confusion_matrices(predictor(network), dataset, dataset.samples("test"))
    assert not network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
