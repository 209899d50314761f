"""Masks as programs write them: which are read as which classes, and which are refused with what reason."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.data.base import IGNORE_INDEX
from harness.data.folder import FolderDataset
from harness.data.masks import LabelRules
from harness.data.mmseg_catalog import label_table
from harness.util.files import digest
from tests.support.tiny_files import labels, picture, save

COLOURS = np.array([[0, 0, 0], [128, 64, 128], [70, 130, 180]], np.uint8)
WITH_COLOURS = "classes: {sky: [0, 0, 0], road: [128, 64, 128], tree: '#4682b4'}\n"
PLAIN = "classes: [sky, road, tree]\n"

Write = Callable[[Path, np.ndarray, int], object]
"""Writes class indices to a path without suffix; the number is that of the mask."""


def dataset(root: Path, text: str, write: Write, classes: int = 3) -> FolderDataset:
    for number, split in enumerate(("train", "train", "test")):
        save(root / "images" / split / f"{number}.png", picture(number))
        path = root / "masks" / split / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, labels(number, classes), number)
    (root / "dataset.yaml").write_text(text)
    return FolderDataset(root / "dataset.yaml", root / "cache")


def check(opened: FolderDataset, classes: int = 3) -> None:
    """The masks are read as what was written."""
    assert opened.digest
    for split in ("train", "test"):
        for sample in opened.samples(split):
            expected = labels(int(sample.name[-1]), classes)
            np.testing.assert_array_equal(opened.load(sample).mask, expected)


def image(suffix: str, of: Callable[[np.ndarray], np.ndarray], mode: str | None = None) -> Write:
    def write(path: Path, mask: np.ndarray, number: int) -> None:
        made = Image.fromarray(of(mask))
        (made if mode is None else made.convert(mode)).save(path.with_suffix(suffix))

    return write


def palette_image(order: Callable[[int], list[int]], colours: np.ndarray = COLOURS, suffix: str = ".png") -> Write:
    """`order(number)[index]` is the class of an index."""

    def write(path: Path, mask: np.ndarray, number: int) -> None:
        of_index = np.array(order(number))
        made = Image.fromarray(np.argsort(of_index)[mask].astype(np.uint8))
        made.putpalette(colours[of_index].ravel().tolist())
        made.save(path.with_suffix(suffix))

    return write


def png_of_depth(depth: int) -> Write:
    """A grey PNG with the indices as samples of 1, 2 or 4 bits."""

    def write(path: Path, mask: np.ndarray, number: int) -> None:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        bits = (mask[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.reshape(len(mask), -1).astype(np.uint8), axis=1)
        data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
        header = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], depth, 0, 0, 0, 0)
        start = b"\x89PNG\r\n\x1a\n"
        path.with_suffix(".png").write_bytes(
            start + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
        )

    return write


def array(dtype: str, add: float = 0) -> Write:
    return lambda path, mask, number: np.save(path.with_suffix(".npy"), mask.astype(dtype) + add)


def same(mask: np.ndarray) -> np.ndarray:
    return mask


def opaque(mask: np.ndarray) -> np.ndarray:
    return np.dstack([*([mask] * 3), np.full_like(mask, 255)])


READ: dict[str, tuple[str, Write]] = {
    "RGB colours": (WITH_COLOURS, image(".png", lambda m: COLOURS[m])),
    "RGBA colours": (WITH_COLOURS, image(".png", lambda m: COLOURS[m], "RGBA")),
    "colours in a BMP": (WITH_COLOURS, image(".bmp", lambda m: COLOURS[m])),
    "colours in a PPM": (WITH_COLOURS, image(".ppm", lambda m: COLOURS[m])),
    "indices where colours are stated": (WITH_COLOURS, image(".png", same)),
    "one palette": (WITH_COLOURS, palette_image(lambda n: [0, 1, 2])),
    "a palette in another order": (WITH_COLOURS, palette_image(lambda n: [[0, 1, 2], [2, 0, 1], [1, 2, 0]][n])),
    "a palette of other colours": (WITH_COLOURS, palette_image(lambda n: [0, 1, 2], COLOURS + np.uint8(9))),
    "a palette without stated colours": (PLAIN, palette_image(lambda n: [0, 1, 2])),
    "a GIF in another order": (WITH_COLOURS, palette_image(lambda n: [2, 0, 1], suffix=".gif")),
    "a grey GIF": (PLAIN, image(".gif", same)),
    "a GIF of few greys": ("classes: {0: sky, 9: road, 99: tree}\n", image(".gif", lambda m: np.uint8([0, 9, 99])[m])),
    "grey RGB": (PLAIN, image(".png", lambda m: np.dstack([m] * 3))),
    "grey RGBA": (PLAIN, image(".png", opaque)),
    "grey with alpha": (PLAIN, image(".png", opaque, "LA")),
    "BMP": (PLAIN, image(".bmp", same)),
    "PGM": (PLAIN, image(".pgm", same)),
    "grey PNG of 2 bits": (PLAIN, png_of_depth(2)),
    "grey PNG of 4 bits": (PLAIN, png_of_depth(4)),
    "16-bit PNG": (PLAIN, image(".png", lambda m: m.astype(np.uint16))),
    "16-bit TIFF": (PLAIN, image(".tif", lambda m: m.astype(np.uint16))),
    "32-bit TIFF": (PLAIN, image(".tiff", lambda m: m.astype(np.int32))),
    "float TIFF": (PLAIN, image(".tif", lambda m: m.astype(np.float32))),
    "int64 array": (PLAIN, array("int64")),
    "float64 array": (PLAIN, array("float64")),
    "array with an axis of 1": (PLAIN, lambda p, m, n: np.save(p.with_suffix(".npy"), m[None])),
    "codes": ("classes: {10: sky, 20: road, 30: tree}\n", image(".png", lambda m: (m + 1) * 10)),
    "codes by name": ("classes: {sky: 10, road: 20, tree: 30}\n", image(".png", lambda m: (m + 1) * 10)),
    "codes of 16 bits": ("classes: {sky: 1000, road: 1001, tree: 1002}\n", array("uint16", 1000)),
    "negative codes": ("classes: {-1: sky, 0: road, 1: tree}\n", array("int8", -1)),
    "255 as a code": ("classes: {0: sky, 1: road, 255: tree}\n", image(".png", lambda m: np.uint8([0, 1, 255])[m])),
    "numbered from 1": (PLAIN + "reduce_zero_label: true\n", image(".png", lambda m: m + 1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_mask_is_read_as_the_classes_that_were_written(tmp_path, kind):
    text, write = READ[kind]
    check(dataset(tmp_path, text, write))


def holed(mask: np.ndarray, value: int) -> np.ndarray:
    changed = mask.astype(np.int32)
    changed[2, 3] = value
    return changed


def white_is_zero(path: Path, mask: np.ndarray, number: int) -> None:
    Image.fromarray(mask).save(path.with_suffix(".tif"), tiffinfo={262: 0})


REFUSED: dict[str, tuple[str, Write, str]] = {
    "a colour of no class": (
        WITH_COLOURS, image(".png", lambda m: np.where((m == 2)[..., None], np.uint8(7), COLOURS[m])),
        "is of no class; `ignore: [[7, 7, 7]]` ignores it",
    ),
    "grey RGB where colours are stated": (
        WITH_COLOURS, image(".png", lambda m: np.dstack([m] * 3)),
        "is of no class; remove the colours from dataset.yaml to read grey masks as class indices",
    ),
    "colours that are not stated": (PLAIN, image(".png", lambda m: COLOURS[m]), "state a different colour for each"),
    "a GIF of colours that are not stated": (PLAIN, palette_image(lambda n: [0, 1, 2], suffix=".gif"), "a colour mask"),
    "a palette that contradicts": (
        WITH_COLOURS, palette_image(lambda n: [1, 0, 2], np.array([[0, 0, 0], [128, 64, 128], [9, 9, 9]], np.uint8)),
        "its palette contradicts dataset.yaml: index 0 has the colour [128, 64, 128] of another class, but index 2 has "
        "[9, 9, 9], which is of none",
    ),
    "transparent pixels": (PLAIN, image(".png", lambda m: np.dstack([m, m, m, m]), "LA"), "has transparent pixels"),
    "several pages": (
        PLAIN, lambda p, m, n: Image.fromarray(m).save(
            p.with_suffix(".tif"), save_all=True, append_images=[Image.fromarray(m)]),
        "holds 2 pages; which one is the mask is unknown",
    ),
    "0 is white": (PLAIN, white_is_zero, "a TIFF whose 0 is white, so its values may be inverted"),
    "fractions": (PLAIN, array("float64", 0.5), "5 at (0, 0): labels are whole numbers"),
    "NaN": (PLAIN, lambda p, m, n: np.save(p.with_suffix(".npy"), np.where(m == 0, np.nan, m)), "value nan at ("),
    "an array of three axes": (
        PLAIN, lambda p, m, n: np.save(p.with_suffix(".npy"), np.dstack([m] * 3)), "an array of uint8 [12, 16, 3]"
    ),
    "objects": (PLAIN, lambda p, m, n: np.save(p.with_suffix(".npy"), m.astype(object)), "allow_pickle=False"),
    "16-bit colours": (PLAIN, lambda p, m, n: rgb16(p.with_suffix(".png"), m), "mode RGB of 16 bits a channel"),
    "a wide value": (PLAIN, image(".tif", lambda m: holed(m, -9)), "label -9 at (2, 3) but 3 classes"),
    "a code that is not declared": (
        "classes: {10: sky, 20: road, 300: tree}\n", lambda p, m, n: np.save(p.with_suffix(".npy"), m * 10 + 10),
        "label 30 at (0, 2) but 3 classes (10, 20, 300) and 255 = ignore",
    ),
}  # fmt: skip


def rgb16(path: Path, mask: np.ndarray) -> None:
    import cv2

    cv2.imwrite(str(path), np.dstack([mask.astype(np.uint16)] * 3))


@pytest.mark.parametrize("kind", REFUSED)
def test_mask_that_cannot_be_read_is_named_with_the_reason(tmp_path, refusal, kind):
    text, write, reason = REFUSED[kind]
    message = refusal(lambda: dataset(tmp_path, text, write).digest)
    assert reason in message
    assert f"{tmp_path}/masks/train/" in message


def test_ignored_values_and_colours_become_255(tmp_path):
    def write(path: Path, mask: np.ndarray, number: int) -> None:
        np.save(path.with_suffix(".npy"), holed(mask, -1 if number else 65535))

    opened = dataset(tmp_path / "values", PLAIN + "ignore: [-1, 65535]\n", write)
    assert opened.digest
    assert [int(opened.load(sample).mask[2, 3]) for sample in opened.samples("train")] == [IGNORE_INDEX] * 2

    colours = np.vstack([COLOURS, [[224, 224, 192]]]).astype(np.uint8)
    opened = dataset(
        tmp_path / "colours",
        WITH_COLOURS + "ignore: [[224, 224, 192]]\n",
        image(".png", lambda m: colours[holed(m, 3)]),
    )
    assert opened.digest
    assert opened.load(opened.samples("train")[0]).mask[2, 3] == IGNORE_INDEX


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("classes: [a, b]", None),
        ("classes: {a: [1, 2, 3], b: [4, 5, 6]}", None),
        ("classes: {0: a, 1: b}", None),
        ("classes: {1: b, 0: a}", (1, 0)),
        ("classes: {a: 10, b: 20}\nignore: [0]", (10, 20)),
        ("classes: {-1: a, 70000: b}", (-1, 70000)),
        ("classes: {0: a, 255: b}", (0, 255)),
        ("classes: [a, b]\nreduce_zero_label: true", (1, 2)),
    ],
)
def test_codes_are_the_values_of_the_classes_in_masks(tmp_path, text, codes):
    (tmp_path / "dataset.yaml").write_text(text)
    assert FolderDataset(tmp_path / "dataset.yaml", tmp_path).codes == codes


def test_codes_of_the_catalogue_are_those_of_its_files():
    rules = LabelRules(label_table(("road", "void", "sky"), ("road", "sky"), reduce_zero_label=True))
    assert rules.codes(2) == (1, 3)


def test_overview_in_a_tiff_is_no_second_page(tmp_path):
    def write(path: Path, mask: np.ndarray, number: int) -> None:
        small = Image.fromarray(mask[::2, ::2])
        small.encoderinfo = {"tiffinfo": {254: 1}}
        Image.fromarray(mask).save(path.with_suffix(".tif"), save_all=True, append_images=[small])

    check(dataset(tmp_path, PLAIN, write))


def test_mask_is_turned_by_its_own_orientation(tmp_path):
    def write(path: Path, mask: np.ndarray, number: int) -> None:
        made = Image.fromarray(np.rot90(mask))  # by a quarter to the left; orientation 6 turns it back
        exif = made.getexif()
        exif[0x0112] = 6
        made.save(path.with_suffix(".png"), exif=exif)

    check(dataset(tmp_path, PLAIN, write))


def test_digest_is_the_same_as_before_there_were_other_masks(tmp_path):
    """Of the fields that were always there, and no others, unless others are given or colours are needed."""
    opened = dataset(tmp_path, WITH_COLOURS, palette_image(lambda n: [0, 1, 2]))
    names = ["train/0", "train/1", "test/2"]
    files = [[tmp_path / kind / f"{name}.png" for kind in ("images", "masks")] for name in names]
    expected = {
        "classes": ["sky", "road", "tree"],
        "labels": [0, 1, 2, *[-1] * 252, 255],
        "scale": None,
        "samples": [[name, name] for name in names],
        "contents": [[hashlib.sha256(path.read_bytes()).hexdigest() for path in pair] for pair in files],
    }
    assert opened.digest == digest(expected)
    (tmp_path / "dataset.yaml").write_text("classes: {0: sky, 1: road, 2: tree}\n")
    assert FolderDataset(tmp_path / "dataset.yaml", tmp_path / "cache").digest == digest(expected)


def test_colours_enter_the_digest_where_masks_are_read_by_them(tmp_path):
    write = image(".png", lambda m: COLOURS[m])
    exchanged = "classes: {sky: [128, 64, 128], road: [0, 0, 0], tree: [70, 130, 180]}\n"
    opened = [dataset(tmp_path, text, write) for text in (WITH_COLOURS, exchanged)]
    assert opened[0].digest != opened[1].digest
    np.testing.assert_array_equal(opened[1].load(opened[1].samples("train")[0]).mask, np.array([1, 0, 2])[labels(0)])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("classes: {no: [0, 0, 0], b: [1, 1, 1]}", "classes: False: YAML reads no, off and false like this"),
        ("classes: {0: yes, 1: b}", "classes: True: YAML reads yes, on and true like this; write the name in quotes"),
        ("classes: [null, b]", "classes[0]: null: YAML reads null and ~ like this"),
        ("classes: [0, 1]", "classes[0]: 0: write the name in quotes"),
        ("classes: {a: 1, b: 1}", "codes: [1, 1]: has a value twice"),
        ("classes: {1: a, 2: b}\ncodes: [1, 2]", "codes: `classes` has the values already; remove one"),
        ("classes: [a, b]\ncodes: [1]", "codes: has 1 values for 2 classes"),
        ("classes: {1: a, 2: b}\nreduce_zero_label: true", "reduce_zero_label: the values of the classes are stated"),
        ("classes: [a, b]\nignore: [0]", "ignore: 0: is the label of class 'a'; `reduce_zero_label: true` ignores 0"),
        ("classes: {a: 300, b: 1}\nignore: [300]", "ignore: 300: is the label of class 'a'"),
        ("classes: {a: [1, 2, 3], b: [4, 5, 6]}\nignore: [[4, 5, 6]]", "is the colour of class 'b'"),
        ("classes: [a, b]\nignore: [[4, 5, 6]]", "is a colour, but no colours of classes are stated"),
        ("classes: {a: '#12', b: '#123456'}", "palette[0]: #12: "),
    ],
)
def test_description_that_cannot_be_meant_is_explained(tmp_path, refusal, text, complaint):
    path = tmp_path / "dataset.yaml"
    path.write_text(text)
    assert complaint in refusal(lambda: FolderDataset(path, tmp_path))
