"""Predicts images with a finished run: public backbone + delta -> label maps and overlays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from harness.data.images import read_image
from harness.engine.device import make_fabric
from harness.engine.evaluation import Predictor
from harness.errors import UserError
from harness.models.delta import load_delta
from harness.models.network import apply_memory_format
from harness.runs.folder import RunFolder
from harness.runs.samples import overlay, save_labels, save_picture
from harness.runs.store import RunStore


def predict_images(
    store: RunStore, run: str, images: Sequence[Path], out: Path, weights: str | None, device: str
) -> Iterator[Path]:
    """Write `NAME.png` (class indices, with a palette) and `NAME.overlay.png` for each image; yields their paths.

    `run` is a run folder, the beginning of a fingerprint, or a delta file. All images are checked before the first is
    predicted. Raises `UserError`.
    """
    delta, run_weights = find_delta(store, run)
    names = [path.stem for path in images]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"predict: two images are named {name}, and would have the same output file; rename one")
    for path in images:
        _read(path)
    network, header = load_delta(delta, weights or run_weights, store.cache)
    fabric = make_fabric(device, header.spec.budget.precision)
    apply_memory_format(fabric.to_device(network), header.spec.budget)
    backbone = network.backbone
    predictor = Predictor(
        network,
        backbone.mean,
        backbone.std,
        header.scale,
        header.spec.budget,
        fabric.device,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {os.strerror(error.errno or 0)}; name another folder") from error
    for path in images:
        image = _read(path)
        labels = predictor([image])[0].cpu().numpy()
        label_path, overlay_path = out / f"{path.stem}.png", out / f"{path.stem}.overlay.png"
        save_labels(label_path, labels, header.palette)
        yield label_path
        save_picture(overlay_path, overlay(image, labels, header.palette))
        yield overlay_path


def find_delta(store: RunStore, run: str) -> tuple[Path, str]:
    """The delta's path, and the `--weights` of its run, `auto` if that file no longer exists. Raises `UserError`."""
    if Path(run).is_file():
        return Path(run), "auto"
    folder: RunFolder = store.find(run)
    result = folder.result()
    if result is None:
        outcome = RunStore(folder.path.parent).outcome(folder)
        raise UserError(
            f"run {run}: not finished ({outcome.state.label}), so there is no delta; rerun it with `harness run`"
        )
    weights = result.provenance.weights.get("given", "auto")
    return folder.delta_path, weights if Path(weights).is_file() else "auto"


def _read(path: Path) -> np.ndarray:
    """An image as datasets read it: [H, W, 3], uint8. Raises `UserError`."""
    try:
        return read_image(path.read_bytes())
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image file") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: not a readable image: {' '.join(reason.split())}") from error
