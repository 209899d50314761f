"""Metrics from confusion matrices, and the file of a run's matrices. Does not import torch: reports use it too."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.errors import UserError, printable
from harness.util.files import atomically, is_unchanged

_LARGEST_MATRICES = 2**33  # bytes
_LONGEST_NAME = 4 * 4096  # bytes


@dataclass(frozen=True)
class Metrics:
    """Scores in 0..1 of one confusion matrix. None: not defined, such as for an absent class."""

    miou: float | None
    macc: float | None
    aacc: float | None
    mdice: float | None
    iou: tuple[float | None, ...]
    acc: tuple[float | None, ...]
    dice: tuple[float | None, ...]
    absent: int
    """Number of classes in neither labels nor predictions; the means leave them out."""


def metrics(matrix: np.ndarray) -> Metrics:
    """The metrics of a confusion matrix [K, K], rows labels, columns predictions.

    IoU = TP / (label + prediction - TP), accuracy = TP / label, Dice = 2 TP / (label + prediction), as mmsegmentation's
    `IoUMetric`; the means leave out classes whose denominator is zero.
    """
    matrix = matrix.astype(np.int64)
    hit, labelled, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    iou = _ratios(hit, labelled + predicted - hit)
    acc = _ratios(hit, labelled)
    dice = _ratios(2 * hit, labelled + predicted)
    return Metrics(
        miou=_mean(iou),
        macc=_mean(acc),
        aacc=_mean(_ratios(hit.sum(keepdims=True), labelled.sum(keepdims=True))),
        mdice=_mean(dice),
        iou=iou,
        acc=acc,
        dice=dice,
        absent=int((labelled + predicted == 0).sum()),
    )


def _ratios(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(n / d) if d else None for n, d in zip(numerator, denominator, strict=True))


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


@dataclass(frozen=True)
class ImageConfusions:
    """The confusion matrices of a run's images."""

    names: list[str]
    groups: list[str] | None
    """Of each image; None where the run is older than this field."""
    matrices: np.ndarray
    """int64 [N, K, K], rows labels, columns predictions."""


def save_confusions(path: Path, names: Sequence[str], groups: Sequence[str], matrices: np.ndarray) -> None:
    """Per-image confusion matrices [N, K, K] as one compressed file of their non-zero entries."""
    image, label, predicted = np.nonzero(matrices)
    with atomically(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(
            handle,
            names=np.array(names, dtype=str),
            groups=np.array(groups, dtype=str),
            shape=np.array(matrices.shape, np.int64),
            image=image.astype(np.int32),
            label=label.astype(np.uint8),
            predicted=predicted.astype(np.uint8),
            pixels=matrices[image, label, predicted].astype(np.int64),
        )


def read_confusions(path: Path, digests: Mapping[str, str], classes: int) -> ImageConfusions:
    """A finished run's file, checked against the digests and the number of classes of its result.

    Raises `UserError` that names the file, without its folder.
    """
    if path.exists() and not is_unchanged(path, digests):
        raise UserError(f"{path.name} was changed after the run ended; run it again")
    try:
        _check_size(path, classes)
        read = load_confusions(path)
        if read.matrices.shape[1] != classes:
            raise ValueError("another number of classes than the result has")
    except Exception as error:  # numpy and zipfile raise many kinds of errors for a damaged file
        raise UserError(f"{path.name} is missing or damaged; run it again") from error
    return read


def _check_size(path: Path, classes: int) -> None:
    """Before anything is unpacked: a file of a few MB may claim gigabytes. Raises `ValueError` and others."""
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as stored:
        sizes = {member.filename.removesuffix(".npy"): member.file_size for member in archive.infolist()}
        images, *sides = (int(side) for side in stored["shape"]) if sizes["shape"] < 1000 else (-1,)
        if sides != [classes, classes] or not 0 <= images * classes**2 * 8 <= _LARGEST_MATRICES:
            raise ValueError(f"matrices of shape {[images, *sides]}")
        most = {"names": images * _LONGEST_NAME, "groups": images * _LONGEST_NAME}
        if any(size > most.get(name, images * classes**2 * 8) + 1000 for name, size in sizes.items()):
            raise ValueError("more entries than the matrices have")


def load_confusions(path: Path) -> ImageConfusions:
    """Load a file of `save_confusions`. Raises errors of many kinds for a damaged file."""
    with np.load(path, allow_pickle=False) as stored:
        matrices = np.zeros(stored["shape"], np.int64)
        matrices[stored["image"], stored["label"], stored["predicted"]] = stored["pixels"]
        # A name that is not UTF-8 has surrogates, which nothing can write.
        names = [printable(name) for name in stored["names"].tolist()]
        groups = [printable(group) for group in stored["groups"].tolist()] if "groups" in stored else None
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2]:
        raise ValueError(f"matrices of shape {list(matrices.shape)}")
    if any(not isinstance(texts, list) or len(texts) != len(matrices) for texts in (names, groups or names)):
        raise ValueError("expected one name and one group per matrix")
    return ImageConfusions(names, groups, matrices)
