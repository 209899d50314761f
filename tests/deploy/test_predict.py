"""`harness predict`: the labels of the evaluation, for any image and any way to give a run, or a one-line error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.data.folder import FolderDataset
from harness.deploy.predict import _windows
from harness.engine.evaluation import confusion
from harness.runs.metrics import load_confusions
from tests.support.in_process import call, refusal, train
from tests.support.tiny_cell import COLOURS, environment


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pretrained.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(timm.create_model("resnet10t").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, colours: Path, tiny: Path, weights: Path) -> Path:
    """The folder of a finished run on weights from a file. Not to be changed."""
    return train(colours, tiny, tmp_path_factory.mktemp("predicted"), "--backbone", "resnet10t", "--weights", weights)


@pytest.fixture
def predict(tmp_path: Path, run: Path) -> Callable[..., list[Path]]:
    """`harness predict` of this run; the files it says it wrote."""

    def written(*arguments: str | Path) -> list[Path]:
        output = call("predict", run, *arguments, "--out", tmp_path / "out", "--device", "cpu")
        assert output.code == 0 and not {"error", "warning"} & {line.split(":")[0] for line in output.err.splitlines()}
        paths = [Path(line) for line in output.out.splitlines()]
        assert sorted(paths) == sorted((tmp_path / "out").iterdir())
        return paths

    return written


def labels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


# What is written


def test_label_maps_match_the_evaluation(predict: Callable[..., list[Path]], run: Path, colours: Path) -> None:
    images = sorted((colours / "images" / "test").iterdir())
    written = predict(*images)
    stored = load_confusions(run / "confusions.npz")
    for image, path in zip(images, written[::2], strict=True):
        mask = np.asarray(Image.open(colours / "masks" / "test" / image.name))
        counted = confusion(torch.tensor(labels_of(path)), torch.tensor(mask), len(COLOURS)).numpy()
        np.testing.assert_array_equal(counted, stored.matrices[stored.names.index(f"test/{image.stem}")])
    assert stored.matrices.sum() > 0


def test_label_maps_and_overlays_have_the_dataset_colours(
    predict: Callable[..., list[Path]], colours: Path, tmp_path: Path
) -> None:
    source = colours / "images/test/0.png"
    label_path, overlay_path = predict(source)
    assert [label_path.name, overlay_path.name] == ["0.labels.png", "0.overlay.png"]
    palette = np.array(FolderDataset(colours / "dataset.yaml", tmp_path).palette)
    shown = np.asarray(Image.open(label_path).convert("RGB"))
    np.testing.assert_array_equal(shown, palette[labels_of(label_path)])
    mixed = (np.asarray(Image.open(source)).astype(float) + shown) / 2
    assert np.abs(np.asarray(Image.open(overlay_path)) - mixed).max() <= 0.5


def test_run_is_found_by_folder_fingerprint_or_delta(run: Path, colours: Path, weights: Path, tmp_path: Path) -> None:
    alone = shutil.copy(run / "delta.safetensors", tmp_path / "from-a-colleague.safetensors")
    image = colours / "images/test/0.png"
    ways = {
        "folder": [run],
        "beginning": [run.name[:6], "--runs", run.parent],
        "delta": [alone, "--weights", weights, "--runs", tmp_path / "no runs here"],
    }
    maps = []
    for name, arguments in ways.items():
        output = call("predict", *arguments, image, "--out", tmp_path / name)
        assert output.code == 0, output.err
        maps.append((tmp_path / name / "0.labels.png").read_bytes())
    assert maps[0] == maps[1] == maps[2]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "grey.png": lambda: Image.fromarray(noise(20, 30)),
    "transparent.png": lambda: Image.fromarray(noise(20, 30, 4)),
    "bits.png": lambda: Image.fromarray(noise(20, 30)).convert("1"),
    "indexed.gif": lambda: Image.fromarray(noise(20, 30, 3)).convert("P"),
    "print.jpg": lambda: Image.fromarray(noise(20, 30, 3)).convert("CMYK"),
    "web.webp": lambda: Image.fromarray(noise(20, 30, 3)),
    "pixel.png": lambda: Image.fromarray(noise(1, 1, 3)),
    "line.png": lambda: Image.fromarray(noise(1, 700, 3)),
    "pole.png": lambda: Image.fromarray(noise(700, 3, 3)),
}


def test_label_maps_have_the_image_size(predict: Callable[..., list[Path]], tmp_path: Path) -> None:
    for name, draw in PICTURES.items():
        draw().save(tmp_path / name)
    written = predict(*(tmp_path / name for name in PICTURES))
    for name, label_path, overlay_path in zip(PICTURES, written[::2], written[1::2], strict=True):
        size = Image.open(tmp_path / name).size
        assert (Image.open(label_path).size, Image.open(overlay_path).size) == (size, size), name
        assert labels_of(label_path).max() < len(COLOURS), name


def test_exif_orientation_is_applied(predict: Callable[..., list[Path]], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "turned.jpg", exif=exif)
    label_path, overlay_path = predict(tmp_path / "turned.jpg")
    assert Image.open(label_path).size == Image.open(overlay_path).size == (20, 30)


# Folders and large images


def test_folder_is_predicted_at_any_depth_and_keeps_its_structure(run: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("a.png", "trip/b.jpg", "trip/deep/b.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(20, 30, 3)).save(photos / name)
    (photos / "notes.txt").write_text("no image")
    for _ in range(2):  # again: what the first command wrote is no image of the second
        output = call("predict", run, photos, "--out", photos / "maps")
        assert output.code == 0, output.err
        written = {path.relative_to(photos / "maps").as_posix() for path in (photos / "maps").rglob("*.png")}
        assert written == {
            "a.labels.png", "a.overlay.png", "trip/b.labels.png", "trip/b.overlay.png", "trip/deep/b.labels.png",
            "trip/deep/b.overlay.png",
        }  # fmt: skip


def test_folder_without_images_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refusal("predict", run, tmp_path / "empty") == f"{tmp_path / 'empty'}: no image in this folder"


@pytest.mark.parametrize("window", [32, 50, 1000])
def test_windows_cover_an_image(predict: Callable[..., list[Path]], tmp_path: Path, window: int) -> None:
    Image.fromarray(noise(83, 131, 3)).save(tmp_path / "large.png")
    label_path, _ = predict(tmp_path / "large.png", "--window", str(window))
    assert labels_of(label_path).shape == (83, 131)
    if window == 1000:
        alone, _ = predict(tmp_path / "large.png")
        assert alone.read_bytes() == label_path.read_bytes()


@pytest.mark.parametrize(("length", "window"), [(100, 32), (33, 32), (32, 32), (7, 32), (131, 50), (1000, 512)])
def test_windows_use_every_pixel_once_and_none_at_an_inner_border(length: int, window: int) -> None:
    used = []
    for begin, end, first, last in _windows(length, window):
        assert 0 <= begin <= first < last <= end <= length and end - begin == min(window, length)
        assert (first == 0 or first > begin) and (last == length or last < end)
        used += range(first, last)
    assert used == list(range(length))


# What is refused, before anything is written


def test_photographs_are_never_overwritten(run: Path, tmp_path: Path) -> None:
    photos = [tmp_path / name for name in ("a.png", "a.labels.png", "b.png", "b.overlay.png")]
    for path in photos:
        Image.fromarray(noise(20, 30, 3)).save(path)
    before = {path: path.read_bytes() for path in photos}
    line = refusal("predict", run, *photos[:2], "--out", tmp_path)
    assert line.startswith(f"--out {tmp_path}: {photos[1]} would overwrite that image; choose another folder")
    line = refusal("predict", run, photos[2], "--out", tmp_path)
    assert line.startswith(
        f"--out {tmp_path}: {photos[3]} exists and was not written by `harness predict`, or was changed"
    )
    assert {path: path.read_bytes() for path in photos} == before
    assert sorted(tmp_path.glob("*.png")) == sorted(photos)


def test_own_files_are_overwritten(predict: Callable[..., list[Path]], tmp_path: Path) -> None:
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "a.png")
    first = [path.read_bytes() for path in predict(tmp_path / "a.png")]
    assert [path.read_bytes() for path in predict(tmp_path / "a.png")] == first


def test_label_map_that_was_corrected_by_hand_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "a.png")
    assert call("predict", run, tmp_path / "a.png", "--out", tmp_path / "out").code == 0
    labels = tmp_path / "out" / "a.labels.png"
    with Image.open(labels) as picture:
        corrected, written = np.asarray(picture).copy(), PngInfo()
        written.add_text("Software", picture.info["Software"])  # which an editor may keep
    corrected[0, 0] ^= 1
    Image.fromarray(corrected).save(labels, pnginfo=written)
    before = labels.read_bytes()
    line = refusal("predict", run, tmp_path / "a.png", "--out", tmp_path / "out")
    assert f"{labels} exists and was not written by `harness predict`, or was changed since" in line
    assert labels.read_bytes() == before


def truncated(path: Path) -> Path:
    Image.fromarray(noise(20, 30, 3)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    return path


def deep(path: Path) -> Path:
    Image.fromarray(noise(20, 30).astype(np.uint16) * 257).save(path)
    return path


def text(path: Path) -> Path:
    path.write_text("not a picture")
    return path


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: path, "not a readable image: No such file or directory"),
        (truncated, "not a readable image: image file is truncated"),
        (text, "not an image file"),
        (deep, "not a readable image: mode I;16: more than 8 bits a channel; convert it to 8-bit RGB"),
    ],
    ids=["missing", "truncated", "text", "16 bits"],
)
def test_unreadable_image_is_named_and_the_others_are_predicted(
    run: Path, colours: Path, tmp_path: Path, make: Callable[[Path], Path], complaint: str
) -> None:
    bad = make(tmp_path / "bad.png")
    output = call("predict", run, bad, colours / "images/test/0.png", "--out", tmp_path / "out")
    assert output.code == 1
    assert output.err.splitlines()[-1].startswith(f"error: {bad}: {complaint}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.labels.png", "0.overlay.png"]


def test_images_with_the_same_name_are_refused(run: Path, colours: Path, tmp_path: Path) -> None:
    images = [colours / "images" / split / "0.png" for split in ("train", "test")]
    line = refusal("predict", run, *images, "--out", tmp_path / "out")
    assert line == f"predict: {images[0]} and {images[1]} would have the same output file; rename one"
    assert not (tmp_path / "out").exists()


def test_changed_delta_is_refused(run: Path, colours: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(run, tmp_path / run.name))
    content = bytearray((changed / "delta.safetensors").read_bytes())
    content[-1] ^= 1
    (changed / "delta.safetensors").write_bytes(content)
    line = refusal("predict", changed, colours / "images/test/0.png", "--out", tmp_path / "out")
    assert line.startswith(f"{changed / 'delta.safetensors'}: was changed after the run ended")


def test_moved_weights_are_requested(run: Path, colours: Path, weights: Path, tmp_path: Path) -> None:
    from huggingface_hub import constants

    image, moved = colours / "images/test/0.png", tmp_path / "moved.safetensors"
    weights.rename(moved)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
            line = refusal("predict", run, image, "--out", tmp_path / "out")
        assert line.startswith(f"{run / 'delta.safetensors'}: was trained on resnet10t with a file of weights, sha256:")
        assert line.endswith("pass that file with --weights PATH")
        assert call("predict", run, image, "--out", tmp_path / "out", "--weights", moved).code == 0
    finally:
        moved.rename(weights)


def test_other_weights_are_refused(run: Path, colours: Path, tmp_path: Path) -> None:
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "other.safetensors")
    for other in (tmp_path / "other.safetensors", "random"):
        line = refusal("predict", run, colours / "images/test/0.png", "--out", tmp_path / "out", "--weights", other)
        assert "was trained on resnet10t with weights sha256:" in line
        assert f"--weights {other} gives" in line
    assert not (tmp_path / "out").exists()


def forged(run: Path, path: Path, change: Callable[[dict], object]) -> Path:
    """The run's delta with another header."""
    with safe_open(run / "delta.safetensors", "pt") as stored:
        metadata = stored.metadata()
    header = json.loads(metadata["header"])
    change(header)
    save_file(load_file(run / "delta.safetensors"), path, {**metadata, "header": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda header: header["spec"].update(backbone="resnet18"), "tensors do): missing: conv1.weight"),
        (lambda header: header["spec"].update(backbone="resnet10"), "backbone: resnet10: unknown; did you mean"),
        (lambda header: header["spec"].update(method="smp"), "method: smp: no such method; did you mean spm?"),
        (lambda header: header["spec"].update(method="linear"), "no such hyperparameter of method linear"),
        (
            lambda header: header["spec"]["hyperparameters"].update(hidden=8),
            "tensors do not fit, the first is backbone",
        ),
        (lambda header: header["spec"]["hyperparameters"].update(hidden=-1), "hidden: -1: input should be greater"),
        (lambda header: header["spec"]["hyperparameters"].update(gaps="9"), "gap 9 does not exist"),
        (lambda header: header["spec"].update(head="fpn:32"), "tensors do not fit"),
        (lambda header: header["spec"].update(head="setr_pup"), "head: setr_pup: is for a ViT"),
        (lambda header: header.update(classes=["one", "two"]), "not a delta: 2 classes and 3 colours"),
        (lambda header: header.update(palette=[[0, 0, 1]] * 400), "not a delta: 3 classes and 400 colours"),
        (lambda header: header.update(scale=[10**9, 10**9]), "not a delta: invalid scale [1000000000, 1000000000]"),
        (lambda header: header["spec"].update(head=f"fpn:{10**9}"), "head: fpn:1000000000: invalid width"),
        (lambda header: header.update(palette=[[0, 0, 256]] * 3), "not a delta: its palette"),
        (lambda header: header.update(scale=[0, 0]), "not a delta: invalid scale"),
        (lambda header: header.pop("spec"), "not a delta: "),
    ],
)
def test_delta_that_does_not_fit_its_header_is_refused(
    run: Path, colours: Path, weights: Path, tmp_path: Path, change: Callable[[dict], object], complaint: str
) -> None:
    delta = forged(run, tmp_path / "delta.safetensors", change)
    arguments = [colours / "images/test/0.png", "--out", tmp_path / "out", "--weights", weights]
    line = refusal("predict", delta, *arguments)
    assert any(part in line for part in complaint.split("|")), line
    assert not (tmp_path / "out").exists()


def test_other_file_is_not_a_delta(run: Path, colours: Path, weights: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((run / "delta.safetensors").read_bytes()[:5000])
    for file in (weights, cut, run / "result.json", run / "spec.yaml"):
        line = refusal("predict", file, colours / "images/test/0.png", "--out", tmp_path / "out")
        assert line.startswith(f"{file}: not a delta: ")


def test_ambiguous_or_unknown_fingerprint_is_refused(
    run: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, image = tmp_path / "runs", colours / "images/test/0.png"
    for name in ("ab" + "0" * 14, "ab" + "1" * 14):
        shutil.copytree(run, runs / name)
    monkeypatch.setenv("HARNESS_RUNS", str(runs))
    assert refusal("predict", "ab", image) == f"run ab: 2 runs in {runs} start with it; use more digits"
    assert refusal("predict", "cd", image) == f"run cd: no such run in {runs}; `harness list runs` prints them"


def test_missing_run_or_image_is_named_without_torch(run: Path, colours: Path, tmp_path: Path) -> None:
    image, absent = colours / "images/test/0.png", tmp_path / "absent.png"
    code = 'import sys; from harness.cli.main import main\ntry: main()\nfinally: assert "torch" not in sys.modules'
    for given, line, exit_code in (
        ((run.parent / "absent", image), f"error: run {run.parent / 'absent'}: no such run in runs; ", 2),
        ((run, absent), f"error: {absent}: not a readable image: No such file or directory\n", 1),
    ):
        command = [sys.executable, "-c", code, "predict", *given]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
        assert done.stderr.startswith(line) and done.returncode == exit_code
    assert list(tmp_path.iterdir()) == []


def test_unfinished_run_has_no_delta(run: Path, colours: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "runs" / run.name)
    (tmp_path / "runs" / run.name / "result.json").unlink()
    (tmp_path / "runs" / run.name / "status.json").write_text('{"state": "diverged"}')
    line = refusal("predict", tmp_path / "runs" / run.name, colours / "images/test/0.png")
    assert line.endswith("not finished (diverged), so there is no delta; rerun it with `harness run`")


def test_file_as_out_folder_is_refused(run: Path, colours: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refusal("predict", run, colours / "images/test/0.png", "--out", tmp_path / "file")
    assert line == f"--out {tmp_path / 'file'}: Not a directory; choose another folder"


def test_unknown_device_is_refused(run: Path, colours: Path, tmp_path: Path) -> None:
    arguments = ["predict", run, colours / "images/test/0.png", "--out", tmp_path / "out", "--device", "tpu"]
    assert refusal(*arguments) == "--device tpu: use auto, cpu, cuda or cuda:N"
    assert not (tmp_path / "out").exists()
