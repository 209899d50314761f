"""`harness check PATH`: what a dataset holds, and what is odd or wrong about it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.cli.tables import print_table
from harness.data.base import SPLITS, SegmentationDataset, Split
from harness.data.catalog import DESCRIPTION, open_dataset
from harness.data.fit import HELD_OUT, file_warnings
from harness.errors import UserError
from harness.util.progress import say


def is_dataset(name: str) -> bool:
    """Whether an argument of `harness check` is a dataset's path, not a method's name."""
    from harness.method import methods

    path = Path(name)
    if "/" in name or path.suffix in (".yaml", ".yml") or os.path.isfile(path / DESCRIPTION):
        return True
    return name not in methods.names() and os.path.isdir(path) and any(path.iterdir())


def check_datasets(paths: Sequence[str], cache: Path, as_json: bool, sheet: Path | None = None) -> int:
    """Print a description of every dataset. Returns 1 if one cannot be used (its error goes to stderr), else 0.

    `sheet` is a new PNG file for the contact sheet of one dataset. Raises `UserError` if it cannot be written.
    """
    if sheet is not None:
        from harness.cli.contact_sheet import check_sheet

        check_sheet(sheet)
        if len(paths) > 1:
            raise UserError(f"--sheet {sheet}: one file for {len(paths)} datasets; check one at a time")
    code = 0
    described = []
    for path in paths:
        try:
            dataset = open_dataset(path, Path(path), cache)
            found = describe(dataset)
        except UserError as error:
            say(f"error: {error}")
            described.append({"dataset": path, "error": str(error)})
            code = 1
            continue
        described.append(found)
        if sheet is not None:
            from harness.cli.contact_sheet import write_sheet

            write_sheet(dataset, sheet)
            found["sheet"] = str(sheet)
        if not as_json:
            _print(found)
    if as_json:
        print(json.dumps(described, indent=2))
    return code


def describe(dataset: SegmentationDataset) -> dict[str, Any]:
    """Counts, sizes, shares of pixels and warnings. Reads all files. Raises `UserError`."""
    digest, sizes = dataset.digest, dataset.working_sizes
    splits = {split: _split(dataset, split) for split in SPLITS if dataset.samples(split)}
    held_out = [*([] if "dev" in splits else ["dev"]), *(["test"] if dataset.test_is_held_out else [])]
    return {
        "dataset": dataset.name,
        "digest": digest,
        "working_sizes": {"median": list(sizes.median), "largest": list(sizes.largest)},
        "scale": dataset.scale and list(dataset.scale),
        "splits": splits,
        "held_out": held_out,
        "warnings": file_warnings(dataset),
    }


def _split(dataset: SegmentationDataset, split: Split) -> dict[str, Any]:
    samples = dataset.samples(split)
    pixels = np.array(dataset.class_pixels(split))
    shares = (pixels / pixels.sum()).tolist()
    return {
        "images": len(samples),
        "groups": len({sample.group for sample in samples}),
        "shares": dict(zip(dataset.classes, shares, strict=False)),
        "ignored": shares[-1],
    }


def _print(found: dict[str, Any]) -> None:
    splits: dict[str, dict[str, Any]] = found["splits"]
    (height, width), (tallest, widest) = found["working_sizes"].values()
    scale = f" at scale {found['scale']}" if found["scale"] else ""
    print(f"{found['dataset']}  {found['digest'][:12]}")
    print(f"height x width{scale}: median {height}x{width}, largest {tallest}x{widest}")
    print_table([{"": what, **{s: str(splits[s][what]) for s in splits}} for what in ("images", "groups")])
    for split in found["held_out"]:
        needed = ", when a run needs it" if split not in splits else ""
        is_one = needed and splits["train"]["groups"] < 2
        print(f"{split}: {'none, since train is one group' if is_one else HELD_OUT + needed}")
    print()
    classes = list(splits["train"]["shares"])
    rows = [{"pixels, %": name, **{s: _percent(splits[s]["shares"][name]) for s in splits}} for name in classes]
    print_table([*rows, {"pixels, %": "ignored", **{s: _percent(splits[s]["ignored"]) for s in splits}}])
    for text in found["warnings"]:
        print(f"warning: {text}")
    if "sheet" in found:
        print(f"contact sheet: {found['sheet']}")


def _percent(share: float) -> str:
    """Two decimals; rare classes do not become 0."""
    return "0" if share == 0 else "<0.01" if share < 0.0001 else f"{100 * share:.2f}"
