"""Images are normalised as for the weights that are loaded; a run records by which mean and std, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.weights import find_weights, load_backbone
from harness.models.delta import load_delta
from harness.runs.folder import RunFolder
from harness.runs.metrics import load_confusions
from tests.support.in_process import train

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
STATED = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
TWO_NORMS = "resnet18d"  # timm has a tag of it for each of the first two


def state(name: str) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name).state_dict()


def loaded(name: str, file: Path | str, cache: Path) -> StagedBackbone:
    return load_backbone(name, find_weights(name, str(file), cache), seed=0)


def norm(backbone: StagedBackbone) -> tuple[tuple[float, ...], ...]:
    return backbone.mean, backbone.std


def tags_by_norm() -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for tag in timm.list_models(f"{TWO_NORMS}.*", pretrained=True):
        config = timm.get_pretrained_cfg(tag)
        found.setdefault((config.mean, config.std), []).append(tag)
    return found


@pytest.mark.parametrize("expected", [IMAGENET, HALF], ids=["imagenet", "half"])
def test_tag_in_the_name_says_how_images_are_normalised(tmp_path: Path, expected: Any) -> None:
    file = tmp_path / "w.safetensors"
    save_file(state(TWO_NORMS), file)
    (tag, *_) = tags_by_norm()[expected]
    for weights in (file, "random"):
        backbone = loaded(tag, weights, tmp_path)
        assert (norm(backbone), backbone.norm_source, backbone.norm_doubt) == (expected, f"as timm's {tag}", "")


def test_name_without_a_tag_is_a_warning_if_its_tags_differ(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(state(TWO_NORMS), file)
    backbone = loaded(TWO_NORMS, file, tmp_path)
    default = backbone.norm_source.removeprefix("as timm's ")
    (others,) = (tags for tags in tags_by_norm().values() if default not in tags)
    assert f"other pre-trainings of {TWO_NORMS} than {default} have other ones: {others[0]}" in backbone.norm_doubt
    assert loaded(TWO_NORMS, "random", tmp_path).norm_doubt == ""  # there is no pre-training to be of
    save_file(state("resnet10t"), file)
    assert loaded("resnet10t", file, tmp_path).norm_doubt == ""


FILES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "entries": lambda tensors: {"model": tensors, "mean": [0.1, 0.2, 0.3], "std": torch.tensor([0.4, 0.5, 0.6])},
    "of 0..255": lambda tensors: {
        "model": tensors, "mean": [255 * value for value in STATED[0]], "std": [255 * value for value in STATED[1]],
    },
    "timm's configuration": lambda tensors: {
        "state_dict": tensors, "pretrained_cfg": {"mean": STATED[0], "std": STATED[1], "tag": "mine"},
    },
    "arguments of timm's training": lambda tensors: {
        "state_dict": tensors, "args": argparse.Namespace(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], lr=0.1),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", [*FILES, "metadata"])
def test_file_that_states_its_norm_takes_precedence(tmp_path: Path, kind: str) -> None:
    if kind == "metadata":
        file = tmp_path / "w.safetensors"
        save_file(
            state(TWO_NORMS), file, {name: json.dumps(v) for name, v in zip(("mean", "std"), STATED, strict=True)}
        )
    else:
        file = tmp_path / "w.pth"
        torch.save(FILES[kind](state(TWO_NORMS)), file)
    backbone = loaded(TWO_NORMS, file, tmp_path)
    for found, expected in zip(norm(backbone), STATED, strict=True):
        assert found == pytest.approx(expected)
    assert (backbone.norm_source, backbone.norm_doubt) == (f"as {file.name} states", "")


@pytest.mark.parametrize(
    "entries",
    [
        {"mean": None, "std": None},
        {"mean": 0.5, "std": 0.5},
        {"mean": [0.5] * 3},
        {"mean": [0.5] * 3, "std": [0.0, 0.5, 0.5]},
        {"mean": [float("nan")] * 3, "std": [0.5] * 3},
        {"mean": "imagenet", "std": "imagenet"},
        {"args": argparse.Namespace(mean=None, std=None)},
    ],
)
def test_what_is_no_norm_is_not_taken_for_one(tmp_path: Path, entries: dict[str, Any]) -> None:
    torch.save({"model": state("resnet10t"), **entries}, tmp_path / "w.pth")
    backbone = loaded("resnet10t", tmp_path / "w.pth", tmp_path)
    assert (norm(backbone), backbone.norm_source) == (IMAGENET, "as timm's resnet10t.c3_in1k")


def test_run_and_prediction_use_and_record_the_norm_of_the_file(colours: Path, tiny: Path, tmp_path: Path) -> None:
    tensors, runs = state("resnet10t"), tmp_path / "runs"
    save_file(tensors, tmp_path / "plain.safetensors")
    metadata = {name: json.dumps(values) for name, values in zip(("mean", "std"), STATED, strict=True)}
    save_file(tensors, tmp_path / "stated.safetensors", metadata)
    plain, stated = (
        train(colours, tiny, runs, "--backbone", "resnet10t", "--weights", tmp_path / f"{name}.safetensors")
        for name in ("plain", "stated")
    )
    lines = [(run / "log.txt").read_text() for run in (plain, stated)]
    assert "with mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225, as timm's resnet10t.c3_in1k" in lines[0]
    assert "images are normalised with mean 0.1, 0.2, 0.3 and std 0.4, 0.5, 0.6, as stated.safetensors" in lines[1]
    recorded = json.loads((stated / "result.json").read_text())["provenance"]["normalisation"]
    assert recorded == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "source": "as stated.safetensors states"}
    losses = [[point["loss"] for point in RunFolder(run).curve()] for run in (plain, stated)]
    assert losses[0] and losses[0] != losses[1]
    for run, expected in ((plain, IMAGENET), (stated, STATED)):  # of equal tensors, either file will do
        for name in ("plain", "stated"):
            network, _ = load_delta(run / "delta.safetensors", str(tmp_path / f"{name}.safetensors"), tmp_path)
            assert norm(network.backbone) == expected


def test_cached_features_of_equal_tensors_are_not_shared_between_norms(
    colours: Path, tiny: Path, tmp_path: Path
) -> None:
    tensors = state("resnet10t")
    save_file(tensors, tmp_path / "plain.safetensors")
    metadata = {name: json.dumps(values) for name, values in zip(("mean", "std"), STATED, strict=True)}
    save_file(tensors, tmp_path / "stated.safetensors", metadata)

    def counts(name: str, runs: str, cache_size: str) -> list[int]:
        more = ["--backbone", "resnet10t", "--weights", tmp_path / f"{name}.safetensors"]
        more += ["--method", "linear", "--cache-size", cache_size]
        run = RunFolder(train(colours, tiny, tmp_path / runs, *more))
        return load_confusions(run.confusions_path).matrices.sum(0).ravel().tolist()

    first, cached = counts("plain", "shared", "100MB"), counts("stated", "shared", "100MB")
    assert first != cached == counts("stated", "alone", "0")
