"""COCO annotations as masks: finds the objects of each image in a JSON file, and rasterises them with pycocotools.

Of objects that overlap, the smaller one is on top, and of equal ones the later one in the file. A crowd region is an
object like any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.base import IGNORE_INDEX
from harness.errors import UserError

_MOST_PIXELS = 1 << 28


class Annotations:
    """The content of a COCO file. Raises `UserError` for a file that is not one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError("expected `images`, `annotations` and `categories`")
            self.categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
            self.images: dict[str, dict[str, Any]] = {str(one["file_name"]): one for one in content["images"]}
            self._objects: dict[Any, list[dict[str, Any]]] = {entry["id"]: [] for entry in self.images.values()}
            if len(self._objects) < len(content["images"]):
                raise ValueError("two images have one id or one file_name")
            for entry in content["annotations"]:
                self._objects.setdefault(entry["image_id"], []).append(entry)
            self._used = {entry["category_id"] for entry in content["annotations"]}
        except OSError as error:
            hint = "`mask` names the file of COCO annotations"
            raise UserError(f"{path}: {error.strerror}", field="mask", hint=hint) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise UserError(f"{path}: not a file of COCO annotations: {reason}", field="mask") from error

    def file_names(self) -> Sequence[str]:
        """The images as the file names them: relative to the folder of images."""
        return list(self.images)

    def used_names(self) -> list[str]:
        """The names of the categories that have objects."""
        return [name for number, name in self.categories.items() if number in self._used]

    def labels(self, classes: Sequence[str], codes: Sequence[int] | None, ignore: Sequence[Any]) -> dict[Any, int]:
        """The class, or `IGNORE_INDEX`, of each category: by its id if `codes` are given, else by its name.

        Raises `UserError` for a category that is neither a class nor ignored.
        """
        labels: dict[Any, int] = {}
        for number, name in self.categories.items():
            if codes is not None and number in codes:
                labels[number] = codes.index(number)
            elif codes is None and name in classes:
                labels[number] = classes.index(name)
            elif number in ignore:
                labels[number] = IGNORE_INDEX
            elif number in self._used:
                raise UserError(
                    f"{self.path}: category {name!r} (id {number}) is not a class",
                    field="classes",
                    hint=f"add it to `classes`, or leave its objects out of training and scores: `ignore: [{number}]`",
                )
        return labels

    def mask(self, file_name: str, labels: dict[Any, int], unlabelled: int) -> bytes:
        """The objects of an image, for `rasterise`: as JSON, so that equal masks have equal bytes."""
        entry = self.images[file_name]
        objects = [
            [labels.get(one["category_id"]), one.get("segmentation"), one.get("id")]
            for one in self._objects[entry["id"]]
        ]
        content = {"size": [entry.get("height"), entry.get("width")], "unlabelled": unlabelled, "objects": objects}
        return json.dumps(content, sort_keys=True).encode()


def rasterise(content: bytes) -> np.ndarray:
    """Labels uint8 [H, W] of what `Annotations.mask` returns. Raises `ValueError` for an object that is not valid."""
    try:
        from pycocotools import mask as coco  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ValueError("COCO annotations need pycocotools: pip install pycocotools (the extra `coco`)") from error

    found = json.loads(content)
    height, width = found["size"]
    if not (_is_side(height) and _is_side(width) and height * width <= _MOST_PIXELS):
        raise ValueError(f"height {height} and width {width} of an image; expected whole numbers of pixels")
    labels = np.full((height, width), found["unlabelled"], np.uint8)
    areas = []
    for label, segmentation, number in found["objects"]:
        if label is None:
            raise ValueError(f"annotation {number} is of a category that is not in `categories`")
        try:
            region = coco.frPyObjects(_checked(segmentation, height, width), height, width)
        except ValueError as error:
            raise ValueError(f"annotation {number} {error}") from error
        region = coco.merge(region) if isinstance(region, list) else region
        areas.append((float(coco.area(region)), label, region))
    for _, label, region in sorted(areas, key=lambda area: -area[0]):
        labels[coco.decode(region) == 1] = label
    return labels


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _checked(segmentation: Any, height: int, width: int) -> Any:
    """Polygons, or run lengths as numbers, that pycocotools reads correctly.

    It takes four numbers for a box, and leaves memory uninitialised where run lengths do not fill the image. Raises
    `ValueError` for others.
    """
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        counts = _run_lengths(counts) if isinstance(counts, str) else counts
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"has run lengths for {segmentation.get('size')}, but its image is {[height, width]}")
        counts = counts if isinstance(counts, list) else []
        whole = all(isinstance(count, int) and count >= 0 for count in counts)
        if not whole or sum(counts) != height * width:
            raise ValueError("has run lengths that do not fill its image")
        return {"size": [height, width], "counts": counts}
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("has no segmentation (a box is not enough); remove it")
    limit = 10 * max(height, width)
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("has a polygon of fewer than three points")
        if not all(
            isinstance(value, int | float) and math.isfinite(value) and abs(value) <= limit for value in polygon
        ):
            raise ValueError("has a polygon far outside its image")
    return segmentation


def _run_lengths(text: str) -> list[int]:
    """COCO's compressed counts: base 32 from character 48 on, least significant digit first.

    From the fourth count on they are differences from the count two before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (digit & 16) and 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
