"""Predicts images with a finished run: public backbone + delta -> label maps and overlays.

Images are read as in training: the delta records how. torch is only imported once the run and the images are found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from harness.data.base import RGB, Bands
from harness.data.images import georeference, is_deep, read_image, too_dark
from harness.errors import UserError
from harness.runs.folder import RunFolder
from harness.runs.samples import is_written_by, overlay, save_labels, save_picture
from harness.runs.store import RunStore
from harness.util.files import is_unchanged
from harness.util.progress import Reporter, warn
from harness.util.text import list_some

if TYPE_CHECKING:
    from harness.engine.evaluation import Predictor
    from harness.models.delta import DeltaHeader

WRITER = "harness predict"
"""What the files name as their software: only such files are overwritten."""
LABELS, TIFF_LABELS, OVERLAY = ".labels.png", ".labels.tif", ".overlay.png"
TIFF = (".tif", ".tiff")


@dataclass(frozen=True)
class Output:
    """One image and the files that are written for it."""

    image: Path
    labels: Path
    overlay: Path


@dataclass(frozen=True)
class Failed:
    """An image that could not be predicted."""

    image: Path
    reason: str


@dataclass(frozen=True)
class Remark:
    """What was done with an image that the user may not expect."""

    image: Path
    text: str


def predict_images(
    store: RunStore,
    run: str,
    images: Sequence[Path],
    out: Path,
    weights: str | None,
    device: str,
    window: int | None = None,
    codes: bool = False,
) -> Iterator[Path | Failed | Remark]:
    """Write `NAME.labels.png` (class indices, with a palette) and `NAME.overlay.png` for each image.

    The labels of a TIFF are `NAME.labels.tif`, with its georeference if it has one. `run` is a run folder, the
    beginning of a fingerprint, or a delta file; `images` are files, and folders with all images below them, whose
    structure is kept. `window`: predict squares with sides of this many pixels, one at a time. `codes`: write the
    values of the dataset's masks, not class indices. Yields the path of every file written, remarks, and the images
    that failed, which do not stop the others. Raises `UserError` before anything is written, also if an output would
    overwrite an image or a file that this command did not write.
    """
    planned = plan_outputs(images, out)
    delta, run_weights = find_delta(store, run)
    outputs = []
    for output in planned:
        if failed := _missing(output.image):
            yield failed
        else:
            outputs.append(output)
    if not outputs:
        return
    from harness.engine.device import make_fabric
    from harness.engine.evaluation import Predictor
    from harness.engine.failures import is_out_of_memory
    from harness.models.delta import load_delta
    from harness.models.network import apply_memory_format

    network, header = load_delta(delta, weights or run_weights, store.cache)
    if window is not None and header.scale is not None:
        size = "x".join(map(str, header.scale))
        raise UserError(f"--window {window}: the run resizes every image to {size}, and needs no windows; leave it out")
    label_codes = _checked_codes(header) if codes else None
    fabric = make_fabric(device, header.spec.budget.precision)
    apply_memory_format(fabric.to_device(network), header.spec.budget)
    backbone = network.backbone
    predictor = Predictor(network, backbone.mean, backbone.std, header.scale, header.spec.budget, fabric.device)
    reporter = Reporter()
    if len(outputs) > 1:
        reporter.start("predict", len(outputs))
    for number, output in enumerate(outputs, 1):
        try:
            image, tags, remark = _read(output.image, header.bands)
            labels = _labels(predictor, image, window)
        except UserError as error:
            yield Failed(output.image, str(error).removeprefix(f"{output.image}: "))
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield Failed(output.image, "out of memory; use --window 512, or less")
            continue
        output.labels.parent.mkdir(parents=True, exist_ok=True)
        if remark is not None:
            yield Remark(output.image, remark)
        save_labels(output.labels, labels, header.palette, WRITER, label_codes, tags)
        yield output.labels
        save_picture(output.overlay, overlay(image, labels, header.palette), WRITER)
        yield output.overlay
        if len(outputs) > 1:
            reporter.advance(number)
    reporter.stop()


def plan_outputs(images: Sequence[Path], out: Path) -> list[Output]:
    """Every image with its files under `out`. Raises `UserError` where two images would have the same files, or where a
    file would be overwritten that `predict` did not write. Writes nothing."""
    outputs: dict[Path, Output] = {}
    for image, name in _find(images, out):
        labels = TIFF_LABELS if image.suffix.lower() in TIFF else LABELS
        planned = Output(image, out / f"{name}{labels}", out / f"{name}{OVERLAY}")
        other = outputs.setdefault(planned.overlay, planned)
        if other is not planned:
            raise UserError(f"predict: {other.image} and {image} would have the same output file; rename one")
    inputs = {output.image.resolve() for output in outputs.values()}
    for output in outputs.values():
        for path in (output.labels, output.overlay):
            if path.resolve() in inputs:
                raise UserError(f"--out {out}: {path} would overwrite that image; choose another folder")
            if os.path.lexists(path) and not is_written_by(path, WRITER, unchanged=True):
                problem = f"{path} exists and was not written by `harness predict`, or was changed since"
                raise UserError(f"--out {out}: {problem}; choose another folder")
    return list(outputs.values())


def _find(images: Sequence[Path], out: Path) -> Iterator[tuple[Path, str]]:
    """Images and their names under the output folder. In a folder only files that Pillow can open by their suffix are
    images, and not what an earlier command wrote."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for path in images:
        if not path.is_dir():
            yield path, path.stem
            continue
        found = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in known
            and file.is_file()
            and not file.name.startswith(".")
            and out.resolve() not in file.resolve().parents
            and not (file.name.endswith((LABELS, TIFF_LABELS, OVERLAY)) and is_written_by(file, WRITER))
        ]
        if not found:
            raise UserError(f"{path}: no image in this folder")
        yield from ((file, file.relative_to(path).with_suffix("").as_posix()) for file in found)


def _labels(predictor: Predictor, image: np.ndarray, window: int | None) -> np.ndarray:
    """uint8 [H, W]. With windows, each pixel's label is from the window in which it is farthest from the border."""
    height, width = image.shape[:2]
    if window is None or max(height, width) <= window:
        return predictor([image])[0].cpu().numpy()
    labels = np.empty((height, width), np.uint8)
    for (top, bottom, first, last), (left, right, start, end) in product(
        _windows(height, window), _windows(width, window)
    ):
        found = predictor([np.ascontiguousarray(image[top:bottom, left:right])])[0].cpu().numpy()
        labels[first:last, start:end] = found[first - top : last - top, start - left : end - left]
    return labels


def _windows(length: int, window: int) -> Iterator[tuple[int, int, int, int]]:
    """Windows along one axis that overlap by a quarter: begin and end of each, and of the part of it that is used."""
    if length <= window:
        yield 0, length, 0, length
        return
    begins = [*range(0, length - window, max(window - window // 4, 1)), length - window]
    cuts = [0, *((one + window + other) // 2 for one, other in pairwise(begins)), length]
    for begin, first, last in zip(begins, cuts[:-1], cuts[1:], strict=True):
        yield begin, begin + window, first, last


def find_delta(store: RunStore, run: str) -> tuple[Path, str]:
    """The delta's path, and the `--weights` of its run, `auto` if that file no longer exists. Raises `UserError`."""
    if os.path.isfile(run):
        return Path(run), "auto"
    folder: RunFolder = store.find(run)
    outcome, result = RunStore(folder.path.parent).read(folder)
    if result is None:
        raise UserError(
            f"run {run}: not finished ({outcome.state.label}), so there is no delta; rerun it with `harness run`"
        )
    if not is_unchanged(folder.delta_path, result.files):
        raise UserError(f"{folder.delta_path}: was changed after the run ended; repeat the command of the run")
    weights = result.provenance.weights.get("given", "auto")
    return folder.delta_path, weights if Path(weights).is_file() else "auto"


def _checked_codes(header: DeltaHeader) -> tuple[int, ...] | None:
    """The values to write, None for class indices. Raises `UserError` for values that a label map cannot hold."""
    if header.codes is None:
        warn("--codes: the delta records no other codes than the class indices (earlier versions recorded none)")
        return None
    if min(header.codes) < 0 or max(header.codes) >= 1 << 16:
        codes = list_some([str(code) for code in header.codes])
        raise UserError(f"--codes: label maps hold 0..65535, and the dataset's label codes are {codes}; leave it out")
    return header.codes


def _missing(image: Path) -> Failed | None:
    try:
        image.stat()
    except OSError as error:
        return Failed(image, f"not a readable image: {error.strerror}")
    return None


def _read(path: Path, bands: Bands) -> tuple[np.ndarray, ImageFileDirectory_v2 | None, str | None]:
    """An image as the dataset's were read: [H, W, 3], uint8; its georeference; a remark. Raises `UserError`."""
    if path.exists() and not path.is_file():  # reading a pipe would block for ever
        raise UserError(f"{path}: not a file")
    try:
        content = path.read_bytes()
        image = read_image(content, bands, trained=True)
        remark = None
        if bands == RGB and is_deep(content):
            if problem := too_dark(int(image.max())):
                raise ValueError(f"16 bits a channel, but {problem}; convert it to 8-bit RGB")
            remark = "16 bits a channel, read by the higher 8; the run's dataset states no `range`"
        return image, georeference(content), remark
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image file") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: not a readable image: {' '.join(reason.split())}") from error
