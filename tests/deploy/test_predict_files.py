"""`harness predict` on files as people have them: depth, bands, the dataset's label codes, georeferences."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.data.base import RGB, Bands
from harness.models.delta import read_delta_header
from harness.runs.metrics import load_confusions
from tests.support.in_process import call, refusal, train
from tests.support.tiny_cell import COLOURS, make_dataset

CODES = (10, 20, 300)
PLACED = {
    33550: (12, (10.0, 10.0, 0.0)),
    33922: (12, (0.0, 0.0, 0.0, 5e5, 5e6, 0.0)),
    34735: (3, (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32633)),
    34737: (2, "WGS 84 / UTM zone 33N|"),
}
"""TIFF tag -> type and value: pixels of 10 m in UTM zone 33N, as GDAL writes them."""


@pytest.fixture(scope="module")
def satellite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of colours as people have satellite scenes: 12 bits in 16, blue first, masks of codes."""
    root = make_dataset(tmp_path_factory.mktemp("data") / "satellite")
    for path in root.glob("images/*/*.png"):
        pixels = np.asarray(Image.open(path)).astype(np.uint16) * 16
        assert cv2.imwrite(str(path), pixels)  # OpenCV's order is BGR
    for path in root.glob("masks/*/*.png"):
        mask = np.asarray(Image.open(path))
        values = np.full(256, 255, np.uint16)
        values[:3] = CODES
        Image.fromarray(values[mask]).save(path)
    described = {"classes": dict(zip(CODES, COLOURS, strict=True)), "range": [0, 4080], "bands": [3, 2, 1]}
    (root / "dataset.yaml").write_text(yaml.safe_dump(described))
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, satellite: Path, tiny: Path) -> Path:
    """The folder of a finished run on it. Not to be changed."""
    return train(satellite, tiny, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """The same delta as of a dataset that states neither, which is also what earlier versions wrote."""
    return forged(run, tmp_path_factory.mktemp("plain") / "plain.safetensors", range=None, bands=None, codes=None)


def forged(run: Path, path: Path, **changes: object) -> Path:
    """The run's delta with other fields in its header; those that are None are left out."""
    with safe_open(run / "delta.safetensors", "pt") as stored:
        metadata = stored.metadata()
    fields = {**json.loads(metadata["header"]), **changes}
    header = json.dumps({name: value for name, value in fields.items() if value is not None or name == "scale"})
    save_file(load_file(run / "delta.safetensors"), path, {**metadata, "header": header})
    return path


def predicted(run: Path, image: Path, out: Path, *more: str) -> np.ndarray:
    """The label map of one image."""
    output = call("predict", run, image, "--out", out, "--device", "cpu", *more)
    assert output.code == 0, output.err
    return np.asarray(Image.open(output.out.splitlines()[0]))


def geotiff(path: Path, pixels: np.ndarray, orientation: int = 1) -> Path:
    """One page of [H, W] or [H, W, 3] with the tags of `PLACED`."""
    tags = ImageFileDirectory_v2()
    for tag, (kind, value) in PLACED.items():
        tags.tagtype[tag] = kind
        tags[tag] = value
    tags[0x0112] = orientation
    Image.fromarray(pixels).save(path, tiffinfo=tags)
    return path


def place(path: Path) -> dict[int, object]:
    with Image.open(path) as image:
        return {tag: image.tag_v2[tag] for tag in PLACED if tag in image.tag_v2}  # type: ignore[attr-defined]


# Reading


def test_range_bands_and_codes_travel_with_the_delta(run: Path, plain: Path) -> None:
    header = read_delta_header(run / "delta.safetensors")
    assert (header.bands, header.codes) == (Bands((0, 4080), (3, 2, 1)), CODES)
    header = read_delta_header(plain)
    assert (header.bands, header.codes) == (RGB, None)


def test_delta_of_a_dataset_that_states_nothing_has_no_further_fields(
    colours: Path, tiny: Path, tmp_path: Path
) -> None:
    delta = train(colours, tiny, tmp_path / "runs") / "delta.safetensors"
    with safe_open(delta, "pt") as stored:
        fields = json.loads(stored.metadata()["header"])
    assert list(fields) == ["spec", "classes", "palette", "scale", "backbone_sha256"]


def test_deep_images_are_read_as_in_training(run: Path, satellite: Path, tmp_path: Path) -> None:
    stored = load_confusions(run / "confusions.npz")
    for image in sorted((satellite / "images/test").iterdir()):
        mask = np.asarray(Image.open(satellite / "masks/test" / image.name)).astype(int)
        labels = predicted(run, image, tmp_path / image.stem)
        counted = [[((mask == code) & (labels == one)).sum() for one in range(3)] for code in CODES]
        np.testing.assert_array_equal(counted, stored.matrices[stored.names.index(f"test/{image.stem}")])


def test_deep_images_without_a_range_are_refused_or_reported(plain: Path, satellite: Path, tmp_path: Path) -> None:
    dark, bright = satellite / "images/test/0.png", tmp_path / "bright.png"
    cv2.imwrite(str(bright), cv2.imread(str(dark), cv2.IMREAD_UNCHANGED) * 16)
    output = call("predict", plain, dark, bright, "--out", tmp_path / "out")
    assert output.code == 1
    warning, error = output.err.splitlines()[-2:]
    assert warning == (
        f"warning: {bright}: 16 bits a channel, read by the higher 8; the run's dataset states no `range`"
    )
    assert error.startswith(f"error: {dark}: not a readable image: 16 bits a channel, but no value above 4")
    assert error.endswith("of 65535: it would be nearly black; convert it to 8-bit RGB")
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("header", "pixels", "complaint"),
    [
        ({}, np.zeros((8, 8), np.uint16), "more than 8 bits a channel; convert it to 8-bit RGB"),
        ({"bands": [3, 2, 1]}, np.zeros((8, 8), np.uint16), "has 1 bands, but `bands` names band 3"),
        ({"bands": [1]}, np.zeros((8, 8), np.uint16), "values of uint16; convert it to the format of the images that"),
        ({"range": [0, 4080]}, np.zeros((8, 8), np.uint8), "has 8 bits a channel, but `range` is [0.0, 4080.0]"),
        ({"range": [0, 9]}, np.zeros((8, 8, 4), np.uint8), "has 4 bands; convert it to the format of the images that"),
    ],
)
def test_image_that_is_not_of_the_runs_format_is_one_line(
    plain: Path, run: Path, tmp_path: Path, header: dict[str, object], pixels: np.ndarray, complaint: str
) -> None:
    delta = forged(run, tmp_path / "d.safetensors", **{"range": None, "bands": None, **header})
    Image.fromarray(pixels).save(tmp_path / "image.png")
    output = call("predict", delta, tmp_path / "image.png", "--out", tmp_path / "out")
    assert output.code == 1
    assert output.err.splitlines()[-1].startswith(f"error: {tmp_path}/image.png: not a readable image: ")
    assert complaint in output.err and "dataset.yaml" not in output.err


def test_tiff_of_many_bands_needs_what_the_run_states(plain: Path, run: Path, satellite: Path, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    rgb = cv2.imread(str(satellite / "images/test/0.png"), cv2.IMREAD_UNCHANGED)
    bands = np.concatenate([np.zeros((*rgb.shape[:2], 10), np.uint16), rgb], axis=2)
    tifffile.imwrite(
        tmp_path / "scene.tif", bands.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"
    )
    delta = forged(run, tmp_path / "d.safetensors", bands=[11, 12, 13])
    expected = predicted(run, satellite / "images/test/0.png", tmp_path / "png")
    np.testing.assert_array_equal(predicted(delta, tmp_path / "scene.tif", tmp_path / "tif"), expected)
    floats = forged(run, tmp_path / "f.safetensors", bands=[11, 12, 13], range=[0, 1])
    tifffile.imwrite(
        tmp_path / "float.tif", (bands / 4080).astype(np.float32), photometric="minisblack", planarconfig="contig"
    )
    np.testing.assert_array_equal(predicted(floats, tmp_path / "float.tif", tmp_path / "tif"), expected)
    output = call("predict", plain, tmp_path / "scene.tif", "--out", tmp_path / "out")
    assert output.code == 1
    (line,) = output.err.splitlines()
    assert line.startswith(f"error: {tmp_path}/scene.tif: not a readable image: a TIFF of bands or depth that are not")
    assert line.endswith("RGB's; convert it to 8-bit RGB")


@pytest.mark.parametrize("length", [0, 6, 8, 300])
@pytest.mark.parametrize("stated", [True, False], ids=["range", "8 bits"])
def test_damaged_tiff_is_one_line(run: Path, plain: Path, tmp_path: Path, length: int, stated: bool) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "whole.tif", np.zeros((64, 64, 3), np.uint16), photometric="rgb")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "whole.tif").read_bytes()[:length])
    output = call("predict", run if stated else plain, tmp_path / "cut.tif", "--out", tmp_path / "out")
    (line,) = output.err.splitlines()
    reasons = ("not an image file", "not a readable image: a damaged TIFF; get the file again",
               "not a readable image: image file is truncated")  # fmt: skip
    assert line.startswith(tuple(f"error: {tmp_path}/cut.tif: {reason}" for reason in reasons))
    assert (output.code, (tmp_path / "out").exists()) == (1, False)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"range": [5, 5]}, "invalid range [5, 5]"),
        ({"bands": [0, 1, 2]}, "invalid bands [0, 1, 2]"),
        ({"bands": [1, 2]}, "invalid bands [1, 2]"),
        ({"codes": [1, 2]}, "2 label codes for 3 classes"),
        ({"codes": "abc"}, "not a delta"),
        ({"stated_norm": [[0.5, 0.5, 0.5], [0, 0, 0]]}, "invalid norm"),
    ],
)
def test_delta_with_invalid_rules_is_refused(
    run: Path, satellite: Path, tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    delta = forged(run, tmp_path / "d.safetensors", **change)
    line = refusal("predict", delta, satellite / "images/test/0.png", "--out", tmp_path / "out")
    assert line.startswith(f"{delta}: not a delta: ") and complaint in line


# Label codes


@pytest.mark.parametrize("codes", [CODES, (7, 255, 0)], ids=["16 bits", "8 bits"])
def test_codes_replace_class_indices(run: Path, satellite: Path, tmp_path: Path, codes: tuple[int, ...]) -> None:
    image = satellite / "images/test/0.png"
    indices = predicted(run, image, tmp_path / "indices")
    delta = forged(run, tmp_path / "d.safetensors", codes=codes)
    np.testing.assert_array_equal(predicted(delta, image, tmp_path / "codes", "--codes"), np.array(codes)[indices])
    with Image.open(tmp_path / "codes/0.labels.png") as written:
        assert written.mode == ("P" if max(codes) < 256 else "I;16")
        colours = np.asarray(written.convert("RGB"))
    if max(codes) < 256:  # the palette follows the codes
        np.testing.assert_array_equal(colours, np.asarray(Image.open(tmp_path / "indices/0.labels.png").convert("RGB")))


def test_codes_that_no_label_map_holds_are_refused(run: Path, satellite: Path, tmp_path: Path) -> None:
    delta = forged(run, tmp_path / "d.safetensors", codes=[-1, 5, 6])
    line = refusal("predict", delta, satellite / "images/test/0.png", "--codes", "--out", tmp_path / "out")
    assert line == "--codes: label maps hold 0..65535, and the dataset's label codes are -1, 5, 6; leave it out"


def test_codes_that_are_not_recorded_are_reported_as_indices(plain: Path, colours: Path, tmp_path: Path) -> None:
    output = call("predict", plain, colours / "images/test/0.png", "--codes", "--out", tmp_path / "out")
    assert output.code == 0
    assert "warning: --codes: the delta records no other codes than the class indices" in output.err


# Georeferences


@pytest.mark.parametrize("more", [(), ("--window", "32"), ("--codes",)], ids=["whole", "windows", "codes"])
def test_georeference_is_read_through_to_the_label_map(
    run: Path, satellite: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    delta = forged(run, tmp_path / "d.safetensors", range=None, bands=None)
    source = (cv2.imread(str(satellite / "images/test/0.png"), cv2.IMREAD_UNCHANGED) // 16).astype(np.uint8)
    image = geotiff(tmp_path / "scene.TIF", source)
    Image.fromarray(source).save(tmp_path / "scene.png")
    labels = predicted(delta, image, tmp_path / "tiff", *more)
    np.testing.assert_array_equal(labels, predicted(delta, tmp_path / "scene.png", tmp_path / "png", *more))
    written = tmp_path / "tiff/scene.labels.tif"
    assert place(written) == {tag: value for tag, (_, value) in PLACED.items()} == place(image)
    with Image.open(written) as opened:
        assert opened.mode == ("I;16" if "--codes" in more else "P")
    before = written.read_bytes()
    predicted(delta, image, tmp_path / "tiff", *more)  # its own file is overwritten, a foreign one is not
    assert written.read_bytes() == before
    geotiff(written, source)
    line = refusal("predict", delta, image, "--out", tmp_path / "tiff")
    assert line.startswith(f"--out {tmp_path}/tiff: {written} exists and was not written by `harness predict`, or was")


def test_tiff_that_is_turned_or_not_placed_has_no_georeference(run: Path, tmp_path: Path) -> None:
    delta = forged(run, tmp_path / "d.safetensors", range=None, bands=None)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    turned = geotiff(tmp_path / "turned.tif", pixels, orientation=6)
    Image.fromarray(pixels).save(tmp_path / "plain.tif")
    for image, shape in ((turned, (30, 20)), (tmp_path / "plain.tif", (20, 30))):
        assert predicted(delta, image, tmp_path / "out").shape == shape
        assert place(tmp_path / "out" / f"{image.stem}.labels.tif") == {}


def test_label_map_has_the_place_of_a_scene_that_rasterio_wrote(run: Path, satellite: Path, tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    transform = rasterio.transform.Affine(10, 2, 5e5, 1, -10, 5e6)
    scene = cv2.imread(str(satellite / "images/test/0.png"), cv2.IMREAD_UNCHANGED).transpose(2, 0, 1)
    size = {"height": scene.shape[1], "width": scene.shape[2], "count": 3, "dtype": "uint16"}
    with rasterio.open(tmp_path / "s.tif", "w", "GTiff", crs="EPSG:3035", transform=transform, **size) as file:
        file.write(scene)
    labels = predicted(run, tmp_path / "s.tif", tmp_path / "out", "--codes")
    with rasterio.open(tmp_path / "out/s.labels.tif") as written:
        assert (written.crs.to_epsg(), written.transform, written.dtypes) == (3035, transform, ("uint16",))
        np.testing.assert_array_equal(written.read(1), labels)
