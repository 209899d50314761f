"""Images as cameras, GIS tools and scanners write them: depth, bands, orientation, sizes and formats."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from harness.data import images
from harness.data.fit import check_fit, warnings
from harness.data.folder import FolderDataset
from harness.data.images import Bands, read_image
from harness.spec import Budget
from tests.support.tiny_files import labels, picture, save, tiff

CLASSES = "classes: [a, b, c]\n"


def png16(pixels: np.ndarray) -> bytes:
    """[H, W] or [H, W, 3], RGB."""
    done, encoded = cv2.imencode(".png", pixels if pixels.ndim == 2 else pixels[..., ::-1])
    assert done
    return encoded.tobytes()


def dataset(root: Path, text: str, content: bytes, suffix: str = ".png") -> FolderDataset:
    for number, split in enumerate(("train", "train", "test")):
        save(root / "masks" / split / f"{number}.png", labels(number))
        path = root / "images" / split / f"{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "dataset.yaml").write_text(CLASSES + text)
    return FolderDataset(root / "dataset.yaml", root / "cache")


def loaded(opened: FolderDataset) -> np.ndarray:
    assert opened.digest
    return opened.load(opened.samples("train")[0]).image


TWELVE_BITS = (picture().astype(np.uint16) * 16) + 15


@pytest.mark.parametrize(
    "content",
    [png16(TWELVE_BITS), cv2.imencode(".tif", TWELVE_BITS[..., ::-1])[1].tobytes()],
    ids=["png", "tiff"],
)
def test_stated_range_scales_the_values_at_their_own_depth(tmp_path, content):
    image = loaded(dataset(tmp_path, "range: [15, 4095]\n", content))
    np.testing.assert_array_equal(image, picture())


def test_values_outside_the_range_are_clipped_and_a_grey_image_becomes_rgb():
    values = np.array([[0, 1000, 2000, 3000, 65535]], np.uint16)
    image = read_image(png16(values), Bands((1000, 3000)))
    assert image[..., 0].tolist() == image[..., 2].tolist() == [[0, 0, 128, 255, 255]]


def test_bands_are_chosen_counted_from_1():
    assert read_image(png16(TWELVE_BITS), Bands((15, 4095), (3, 2, 1)))[0, 0].tolist() == picture()[0, 0, ::-1].tolist()
    assert read_image(png16(TWELVE_BITS), Bands((15, 4095), (2,)))[0, 0].tolist() == [picture()[0, 0, 1]] * 3


def test_bands_of_a_tiff_that_are_not_named_are_chosen():
    np.testing.assert_array_equal(read_image(tiff(TWELVE_BITS), Bands((15, 4095))), picture())
    values = np.arange(5, dtype=np.uint16)[None, None] * 100 + np.zeros((4, 6, 1), np.uint16)
    assert read_image(tiff(values[..., :4]), Bands((0, 510), (4, 3, 2)))[0, 0].tolist() == [150, 100, 50]
    assert read_image(tiff(values[..., :4]), Bands((0, 510), (2,)))[0, 0].tolist() == [50, 50, 50]
    eight = read_image(tiff(values[..., :4].astype(np.uint8)), Bands(None, (3, 2, 1)))
    assert eight[0, 0].tolist() == [200, 100, 0]


def test_floats_are_scaled_and_nan_is_the_lowest():
    values = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)[..., None]
    assert read_image(tiff(values), Bands((0, 1)))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_range_that_clips_most_values_and_blank_images_are_warnings(tmp_path):
    values = 4000 + TWELVE_BITS // 2
    warned = dataset(tmp_path, "range: [0, 3000]\n", png16(values)).oddities
    assert "100 % of the image values of test are at or beyond an end of `range`, or NaN: they become" in warned[1]
    assert warned[2:] == ["3 images (train/0 first) blank: all values are equal"]
    assert dataset(tmp_path, "range: [3500, 6500]\n", png16(values)).oddities == []


def test_nothing_but_nan_is_a_warning(tmp_path):
    nothing = tiff(np.full((12, 16, 1), np.nan, np.float32))
    assert "100 % of the image values of train" in dataset(tmp_path, "range: [0, 1]\n", nothing, ".tif").oddities[0]


def test_stated_range_of_8_bits_does_not_need_another_depth(tmp_path):
    content = save(tmp_path / "a.png", picture()).read_bytes()
    np.testing.assert_array_equal(read_image(content, Bands((0, 255))), picture())


def test_range_and_bands_enter_the_digest(tmp_path):
    texts = ("range: [0, 4095]\n", "range: [0, 8191]\n", "range: [0, 4095]\nbands: [3, 2, 1]\n")
    assert len({dataset(tmp_path, text, png16(TWELVE_BITS)).digest for text in texts}) == 3


GREY16 = png16(TWELVE_BITS[..., 0])
UNREAD: dict[str, tuple[str, bytes, str]] = {
    "grey of 16 bits": ("", GREY16, "mode I;16: more than 8 bits a channel; state `range: [lowest, highest]` of"),
    "12 bits in RGB of 16": (
        "", png16(TWELVE_BITS),
        "16 bits a channel, as 3 images, but no value above 4095 of 65535: it would be nearly black; state `range:",
    ),
    "bands that are not named": (
        "", tiff(np.zeros((12, 16, 5), np.uint16)), "state `bands: [red, green, blue]`, counted from 1, in dataset",
    ),
    "four bands": ("range: [0, 4095]", png16(np.dstack([TWELVE_BITS] * 2)[..., :4]), "has 4 bands; state `bands: "),
    "a band too many": ("range: [0, 9]\nbands: [1, 2, 4]", png16(TWELVE_BITS), "has 3 bands, but `bands` names band 4"),
    "bands without a range": ("bands: [3, 2, 1]", png16(TWELVE_BITS), "values of uint16; state `range: [lowest, "),
    "8 bits among 16": (
        "range: [0, 4095]", png16(picture()), "has 8 bits a channel, but `range` is [0.0, 4095.0]; convert the file",
    ),
    "not an image": ("range: [0, 4095]", b"hello", "0.png: not an image file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREAD)
def test_image_of_unknown_depth_or_bands_is_one_line_with_the_remedy(tmp_path, refusal, kind):
    text, content, complaint = UNREAD[kind]
    message = refusal(lambda: dataset(tmp_path, text, content).digest)
    assert complaint in message
    assert f"{tmp_path}/images/train/0.png: " in message


def test_rgb_of_16_bits_that_uses_its_range_is_read_as_before(tmp_path):
    full = picture().astype(np.uint16) * 257
    np.testing.assert_array_equal(loaded(dataset(tmp_path, "", png16(full))), picture())


@pytest.mark.parametrize("bands", [2, 3, 5])
def test_tiff_that_opencv_would_read_wrongly_names_the_package(monkeypatch, bands):
    monkeypatch.setattr(images, "_by_tifffile", lambda content: None)
    with pytest.raises(ValueError, match=f"a TIFF of {bands} bands of 16 bits; pip install tifffile imagecodecs"):
        read_image(tiff(np.zeros((4, 6, bands), np.uint16)), Bands((0, 1)))


def test_palette_tiff_has_no_bands(tmp_path):
    Image.fromarray(picture()).quantize(8).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a TIFF of palette or YCbCr colours"):
        read_image((tmp_path / "a.tif").read_bytes(), Bands(None, (1, 2, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_orientation_is_the_same_at_every_depth(tmp_path, orientation, suffix):
    made = Image.fromarray(picture())
    exif = made.getexif()
    exif[0x0112] = orientation
    made.save(tmp_path / f"a{suffix}", exif=exif)
    content = (tmp_path / f"a{suffix}").read_bytes()
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"a{suffix}")))
    np.testing.assert_array_equal(read_image(content), upright)
    np.testing.assert_array_equal(read_image(content, Bands((0, 255))), upright)


def turned(path: Path, orientation: int, height: int = 12) -> None:
    made = Image.fromarray(picture(0, height))
    exif = made.getexif()
    exif[0x0112] = orientation
    made.save(path, exif=exif)


def test_mask_of_the_image_before_it_is_turned_is_explained(tmp_path, refusal):
    opened = dataset(tmp_path, "", png16(picture()))
    turned(tmp_path / "images/train/0.png", 6)
    assert refusal(lambda: opened.digest).endswith(
        "masks/train/0.png: 16x12 pixels, but "
        f"{tmp_path}/images/train/0.png has 12x16 after its EXIF orientation, 6; turn the mask too, or remove the "
        "orientation"
    )


def test_turned_image_whose_size_does_not_show_it_is_a_warning(tmp_path):
    opened = dataset(tmp_path, "", save(tmp_path / "a.png", picture()).read_bytes())
    turned(tmp_path / "images/train/0.png", 3)
    budget = Budget(name="t", steps=1, batch_size=1, crop=(12, 16))
    assert warnings(opened, budget)[0] == (
        f"{tmp_path.name}: 1 image (train/0 first) turned by EXIF orientation, and the mask is not: check that they "
        "match"
    )


@pytest.mark.parametrize(("image", "mask"), [("9.ppm", "9.gif"), ("9.jp2", None), ("sub/9.HEIC", "sub/9.png")])
def test_pair_in_a_format_that_is_not_read_is_named(tmp_path, refusal, image, mask):
    opened = dataset(tmp_path, "", png16(picture()))
    for kind, name in (("images", image), ("masks", mask)):
        if name:
            path = tmp_path / kind / "train" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("a picture")
    message = refusal(lambda: opened.digest)
    assert f"{tmp_path}/images/train/{image}: {Path(image).suffix} is not read; images are .bmp, .jpeg, .jpg" in message


def test_jpeg_mask_is_named_as_lossy(tmp_path, refusal):
    opened = dataset(tmp_path, "", png16(picture()))
    (tmp_path / "masks/train/0.png").rename(tmp_path / "masks/train/0.jpg")
    message = refusal(lambda: opened.digest)
    assert (
        f"images/train/0.png: its mask {tmp_path}/masks/train/0.jpg is a .jpg, which is not read; save it as" in message
    )


def test_other_files_beside_the_images_and_previews_of_masks_are_left_alone(tmp_path):
    opened = dataset(tmp_path, "", png16(picture()))
    for name in ("images/train/0.npy", "images/train/readme.txt", "masks/train/0.gif", "masks/train/preview.bmp"):
        (tmp_path / name).write_text("something else")
    assert len(opened.samples("train")) == 2
    assert opened.digest


def test_image_too_thin_for_a_resize_is_a_one_line_error(tmp_path, refusal):
    opened = dataset(tmp_path, "", png16(picture()))
    save(tmp_path / "images/train/1.png", picture(1, 1, 7))
    save(tmp_path / "masks/train/1.png", labels(1, height=1, width=7))
    budget = Budget(name="t", steps=1, batch_size=1, crop=(12, 16), resize=(0.5, 2.0))
    assert refusal(lambda: check_fit(opened, budget, "report")) == (
        f"budget t: train/1 of {tmp_path.name} is 1 pixel thin at working size, and vanishes at 0.5 of it; leave the "
        "image out, or use a higher `resize`"
    )
    check_fit(opened, budget.model_copy(update={"resize": (1.0, 2.0)}), "report")
