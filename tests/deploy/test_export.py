"""`harness export`: what is written computes what was trained, and needs neither weights nor a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.deploy.export import load_exported
from harness.models.delta import load_delta
from tests.support.in_process import call, refusal
from tests.support.tiny_cell import run_arguments


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, colours: Path, tiny: Path) -> Path:
    """The folder of a finished run of SPM. Not to be changed."""
    said = call(*run_arguments(colours, tiny, tmp_path_factory.mktemp("exported")))
    assert said.code == 0, said.err
    return Path(said.out.splitlines()[-1])


def trained(run: Path, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image, and the logits of the network as it was trained."""
    network, _ = load_delta(run / "delta.safetensors", "random", run.parent / ".cache")
    images = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        return images, network(images)


def test_a_state_dict_is_loaded_without_weights_and_gives_the_same_logits(run: Path, tmp_path: Path) -> None:
    said = call("export", run, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert [Path(line).suffix for line in said.out.splitlines()] == [".safetensors", ".json"]
    images, expected = trained(run, 48)
    with torch.inference_mode():
        assert torch.equal(load_exported(tmp_path / "out")(images), expected)


def test_the_recipe_says_what_to_feed_and_what_comes_out(run: Path, tmp_path: Path) -> None:
    call("export", run, "--out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.json")
    recipe = json.loads(path.read_text())
    assert recipe["classes"] == ["brick", "grass", "water"]
    assert recipe["fingerprint"] == run.name
    assert len(recipe["mean"]) == len(recipe["std"]) == 3
    assert (tmp_path / "out" / recipe["file"]).is_file()


def test_torchscript_gives_the_same_logits_without_the_harness(run: Path, tmp_path: Path) -> None:
    said = call("export", run, "--out", tmp_path / "out", "--format", "torchscript")
    assert said.code == 0, said.err
    images, expected = trained(run, 32)
    loaded = torch.jit.load(said.out.splitlines()[0])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-4)


def test_a_method_that_cannot_be_merged_is_refused_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    line = refusal("export", run, "--out", tmp_path / "out", "--merge")
    assert "spm cannot be folded into a backbone; these can: " in line
    assert not (tmp_path / "out").exists()


def test_onnx_runs_where_its_packages_are_and_is_one_line_where_they_are_not(run: Path, tmp_path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        line = refusal("export", run, "--out", tmp_path / "out", "--format", "onnx")
        assert "is not installed; pip install onnx onnxscript" in line
    else:
        assert call("export", run, "--out", tmp_path / "out", "--format", "onnx").code == 0


@pytest.mark.parametrize("method", ["bias", "fact", "lora", "repadapter", "ssf"])
def test_a_merged_network_has_the_bare_backbones_modules_and_the_same_logits(
    method: str, colours: Path, tiny: Path, tmp_path: Path
) -> None:
    said = call(*run_arguments(colours, tiny, tmp_path / "runs", "--method", method, "--backbone", "test_vit"))
    assert said.code == 0, said.err
    run = Path(said.out.splitlines()[-1])
    assert call("export", run, "--merge", "--out", tmp_path / "out").code == 0
    merged = load_exported(tmp_path / "out")
    assert merged.method.name == "linear" and len(merged.backbone.added) == 0
    images, expected = trained(run, 48)
    with torch.inference_mode():
        torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-4)
