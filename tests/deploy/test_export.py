"""`harness export`: the exported network gives the trained logits, without weights and without a run folder."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from harness.deploy.export import export, load_exported
from harness.models.delta import load_delta, read_delta_header
from harness.runs.folder import RunFolder
from harness.runs.store import RunStore
from tests.support.in_process import call, refusal, train
from tests.support.oracle import attainable, batch, miou, oracle_network, world


@pytest.fixture(scope="module")
def run(whole: RunFolder) -> Path:
    """The folder of a finished run of SPM. Not to be changed."""
    return whole.path


def trained(run: Path, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image, and the logits of the network as it was trained."""
    network, _ = load_delta(run / "delta.safetensors", "random", run.parent / ".cache")
    images = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        return images, network(images)


def test_state_dict_loads_without_weights_and_gives_the_same_logits(run: Path, tmp_path: Path) -> None:
    output = call("export", run, "--out", tmp_path / "out")
    assert output.code == 0, output.err
    assert [Path(line).suffix for line in output.out.splitlines()] == [".safetensors", ".json"]
    images, expected = trained(run, 48)
    with torch.inference_mode():
        assert torch.equal(load_exported(tmp_path / "out")(images), expected)


def test_recipe_describes_input_and_output(run: Path, tmp_path: Path) -> None:
    call("export", run, "--out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.json")
    recipe = json.loads(path.read_text())
    assert recipe["classes"] == ["brick", "grass", "water"]
    assert recipe["fingerprint"] == run.name
    assert len(recipe["mean"]) == len(recipe["std"]) == 3
    assert (tmp_path / "out" / recipe["file"]).is_file()


def test_export_overwrites_its_own_files_and_no_others(run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert call("export", run, "--out", tmp_path).code == 0
    (recipe,) = tmp_path.glob("*.json")
    other = json.loads(recipe.read_text()) | {"fingerprint": "0" * 16}
    recipe.write_text(json.dumps(other))
    assert refusal("export", run, "--out", tmp_path) == (
        f"{recipe}: exists and is not an export of this run; choose another folder with --out"
    )
    assert json.loads(recipe.read_text()) == other


def test_torchscript_gives_the_same_logits(run: Path, tmp_path: Path) -> None:
    output = call("export", run, "--out", tmp_path / "out", "--format", "torchscript")
    assert output.code == 0, output.err
    images, expected = trained(run, 32)
    loaded = torch.jit.load(output.out.splitlines()[0])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_torchscript_with_the_recipe_registers(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An oracle in place of the trained network, whose output is used as the recipe says, at a crop of no multiple."""
    size, worlds = (97, 131), [world(seed) for seed in range(3)]
    labels = [one[: size[0], : size[1]] for one in worlds]
    network, header = oracle_network(name, "fpn:8"), read_delta_header(run / "delta.safetensors")
    spec = header.spec.model_copy(update={"budget": header.spec.budget.model_copy(update={"crop": size})})
    monkeypatch.setattr("harness.deploy.export.load_delta", lambda *_: (network, replace(header, spec=spec)))
    script, path = export(RunStore(run.parent), str(run), tmp_path, "torchscript", merge=False, weights=None)
    recipe = json.loads(path.read_text())
    assert recipe["size"] == list(size)
    multiple = recipe["canvas_multiple"]
    canvas = [math.ceil(side / multiple) * multiple for side in size]
    with torch.inference_mode():
        logits = [torch.jit.load(script)(batch([one], network.backbone)[0]) for one in labels]
    upsampled = [F.interpolate(one, canvas, mode="bilinear", align_corners=False) for one in logits]
    predicted = [one[0, :, : size[0], : size[1]].argmax(0) for one in upsampled]
    assert miou(predicted, labels) >= attainable(worlds, 4, size) - 1


def test_unmergeable_method_is_refused_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    line = refusal("export", run, "--out", tmp_path / "out", "--merge")
    assert "--merge: spm cannot be merged; these methods can: " in line
    assert not (tmp_path / "out").exists()


def test_onnx_is_written_or_names_the_missing_package(run: Path, tmp_path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        line = refusal("export", run, "--out", tmp_path / "out", "--format", "onnx")
        assert "is not installed; pip install onnx onnxscript" in line
    else:
        assert call("export", run, "--out", tmp_path / "out", "--format", "onnx").code == 0


@pytest.mark.parametrize(
    "method",
    ["lora", "ssf", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("bias", "fact", "repadapter"))],
)
def test_merged_network_has_no_added_modules_and_the_same_logits(
    method: str, colours: Path, tiny: Path, tmp_path: Path
) -> None:
    run = train(colours, tiny, tmp_path / "runs", "--method", method, "--backbone", "test_vit")
    assert call("export", run, "--merge", "--out", tmp_path / "out").code == 0
    merged = load_exported(tmp_path / "out")
    assert merged.method.name == "linear" and len(merged.backbone.added) == 0
    images, expected = trained(run, 48)
    with torch.inference_mode():
        torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-4)
