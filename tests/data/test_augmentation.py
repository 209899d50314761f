"""Augmentation is a pure function of a seed; the stream of training samples is one for all methods."""

from __future__ import annotations

import logging
import random
import sys
import warnings

import numpy as np
import pytest
import torch

from harness.data import augmentation
from harness.data.augmentation import Augmentation, TrainStream, prepare
from harness.data.base import IGNORE_INDEX, Pair
from harness.data.folder import FolderDataset
from harness.spec import Budget
from harness.util.quiet import quiet_imports

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOURS = np.array([[250, 10, 10], [10, 240, 20], [20, 30, 230]], np.uint8)


def budget(**fields) -> Budget:
    return Budget(**{"name": "test", "steps": 10, "batch_size": 4, "crop": (32, 40), **fields})


def coloured_pair(height: int = 48, width: int = 64) -> Pair:
    """Large rectangles whose colour says their label."""
    mask = np.kron(np.random.default_rng(0).integers(0, 3, (height // 16, width // 16)), np.ones((16, 16)))
    mask = mask.astype(np.uint8)
    return Pair(COLOURS[mask], mask)


def colours_of(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] in 0..255 of a normalised [3, H, W]."""
    return (image.transpose(1, 2, 0) * STD + MEAN) * 255


def test_result_only_depends_on_the_seed():
    pair = coloured_pair()
    first, second = (Augmentation(budget(), None, MEAN, STD) for _ in range(2))
    forwards = [first(pair, seed) for seed in range(8)]
    backwards = [second(pair, seed) for seed in reversed(range(8))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    assert len({image.tobytes() for image, _ in forwards}) == 8


def test_global_random_state_and_the_pair_are_unchanged():
    pair = coloured_pair()
    pair.image.setflags(write=False)
    pair.mask.setflags(write=False)
    np.random.seed(3)
    random.seed(3)
    expected = np.random.get_state()[1].tolist(), random.getstate()
    Augmentation(budget(), None, MEAN, STD)(pair, 7)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == expected


@pytest.mark.parametrize("scale", [None, (128, 96)])
def test_labels_stay_on_their_pixels(scale):
    augment, pair = Augmentation(budget(photometric=False), scale, MEAN, STD), coloured_pair()
    compared = 0
    for seed in range(30):
        image, mask = augment(pair, seed)
        colours = colours_of(image)
        # Away from edges no pixel is a blend of two: there the nearest colour is the label's own.
        pure = (np.abs(colours[..., None, :] - COLOURS).max(-1) < 2).any(-1) & (mask != IGNORE_INDEX)
        nearest = np.abs(colours[..., None, :] - COLOURS).sum(-1).argmin(-1)
        agree = (nearest == mask)[pure]
        # Nearest and bilinear sampling round differently at a rectangle's edge, by less than a pixel.
        assert agree.mean() > 0.97
        compared += pure.sum()
    assert compared > 10_000


def test_padding_is_zero_and_ignored():
    augment = Augmentation(budget(crop=(64, 80), resize=(1, 1)), None, MEAN, STD)
    image, mask = augment(coloured_pair(), 0)
    assert (image.shape, mask.shape) == ((3, 64, 80), (64, 80))
    assert (image.dtype, mask.dtype) == (np.float32, np.uint8)
    outside = np.ones((64, 80), bool)
    outside[:48, :64] = False
    assert (mask[outside] == IGNORE_INDEX).all() and (mask[~outside] != IGNORE_INDEX).all()
    assert (image[:, outside] == 0).all()


def test_without_randomness_the_image_is_only_normalised():
    plain = budget(crop=(48, 64), resize=(1, 1), flip=0, photometric=False)
    pair = coloured_pair()
    image, mask = Augmentation(plain, None, MEAN, STD)(pair, 0)
    np.testing.assert_allclose(colours_of(image), pair.image, atol=1e-3)
    np.testing.assert_array_equal(mask, pair.mask)
    np.testing.assert_array_equal(prepare(pair.image, None, MEAN, STD), image)


def test_photometric_distortion_sees_bgr(monkeypatch):
    seen = []
    augment = Augmentation(budget(crop=(48, 64), resize=(1, 1), flip=0), None, MEAN, STD)
    distort = augment._photometric.transform
    monkeypatch.setattr(augment._photometric, "transform", lambda r: (seen.append(r["img"].copy()), distort(r))[1])
    pair = coloured_pair()
    augment(pair, 0)
    np.testing.assert_array_equal(seen[0], pair.image[..., ::-1])


def test_evaluation_fits_the_scale_and_preserves_the_aspect_ratio():
    # 48x64 fits (128, 80) at min(128 / 64, 80 / 48) = 1.67: 80x107.
    assert prepare(coloured_pair().image, (128, 80), MEAN, STD).shape == (3, 80, 107)


@pytest.fixture
def dataset(folder) -> FolderDataset:
    return FolderDataset(folder / "dataset.yaml", folder / "cache")


def stream(dataset: FolderDataset, seed: int = 0, **fields) -> TrainStream:
    return TrainStream(dataset, dataset.samples("train"), budget(**fields), seed, MEAN, STD)


def test_sample_at_a_position_does_not_depend_on_earlier_reads(dataset):
    ahead, back = stream(dataset), stream(dataset)
    forwards = [ahead[position] for position in range(len(ahead))]
    backwards = [back[position] for position in reversed(range(len(back)))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_workers_do_not_change_the_stream(dataset):
    alone, shared = (torch.utils.data.DataLoader(stream(dataset), 4, num_workers=n) for n in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_longer_budget_continues_the_stream_of_a_shorter_one(dataset):
    short, long = stream(dataset, steps=2), stream(dataset, steps=9)
    assert (len(short), len(long)) == (8, 36)
    assert all(torch.equal(short[position][0], long[position][0]) for position in range(8))
    with pytest.raises(IndexError):
        short[8]


def test_every_epoch_is_a_permutation_and_epochs_and_seeds_differ(dataset):
    def orders(seed: int) -> list[tuple[int, ...]]:
        one = stream(dataset, seed)
        return [tuple(one.index(4 * epoch + place) for place in range(4)) for epoch in range(10)]

    assert all(sorted(order) == [0, 1, 2, 3] for order in orders(0))
    assert len(set(orders(0))) > 1
    assert orders(0) != orders(1)


def test_repeated_sample_is_augmented_differently(dataset):
    one = stream(dataset)
    shown = [one[position][0].numpy().tobytes() for position in range(40)]
    assert len(set(shown)) == 40


def test_small_dataset_is_decoded_once(dataset, monkeypatch):
    loads = []
    load = dataset.load
    monkeypatch.setattr(dataset, "load", lambda sample: (loads.append(sample.name), load(sample))[1])
    one = stream(dataset)
    for position in range(12):
        one[position]
    assert sorted(loads) == [sample.name for sample in dataset.samples("train")]


def test_pairs_beyond_the_memory_limit_are_decoded_again(dataset, monkeypatch):
    kept = [stream(dataset)[position] for position in range(12)]
    monkeypatch.setattr(augmentation, "CACHED_BYTES", 0)
    one = stream(dataset)
    assert all(torch.equal(one[position][0], kept[position][0]) for position in range(12))
    assert not one._pairs


def test_quiet_imports_hide_prints_and_warnings_but_not_errors(capsys):
    stdout = sys.stdout
    with pytest.raises(ZeroDivisionError), quiet_imports():
        print("noise")
        warnings.warn("noise", stacklevel=1)
        raise ZeroDivisionError
    assert sys.stdout is stdout
    assert capsys.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def test_loggers_made_during_quiet_imports_still_reach_stderr(capsys):
    with quiet_imports():
        handler = logging.StreamHandler()
    handler.emit(logging.makeLogRecord({"msg": "kept"}))
    assert capsys.readouterr().err == "kept\n"
