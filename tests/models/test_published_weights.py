"""Files of weights in the layouts in which they are published: the right tensors in the right places, or one line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from harness.errors import UserError
from harness.models.backbones import families
from harness.models.backbones.tensor_files import read_checkpoint
from harness.models.backbones.weights import Weights, find_weights, load_backbone, tensors_digest
from tests.support.in_process import call, refusal, runs_in
from tests.support.published_layouts import (
    LAYOUTS,
    RESNET,
    TINY,
    State,
    network,
    read_into,
    saved,
    segmentor,
    under,
)
from tests.support.tiny_cell import run_arguments


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layout_gives_the_features_of_timms_network(tmp_path: Path, layout: str) -> None:
    name, write = LAYOUTS[layout]
    source = network(name, 0)
    content = write({key: tensor.clone() for key, tensor in source.state_dict().items()})
    backbone, fit = read_into(name, saved(tmp_path, content))
    assert fit.resampled == []
    expected = families.cut(name, source)
    images = torch.rand(1, 3, 64, 64)
    loose = {"atol": 1e-2} if "half" in layout else {"atol": 1e-5}
    for ours, timms in zip(backbone(images), expected(images), strict=True):
        torch.testing.assert_close(ours, timms, rtol=1e-3, **loose)
    if "half" not in layout and "registers" not in layout:
        assert tensors_digest(backbone) == tensors_digest(expected)


def test_features_of_mmsegmentations_swin(tmp_path: Path) -> None:
    from mmseg.models.backbones import SwinTransformer

    torch.manual_seed(0)
    theirs = SwinTransformer(embed_dims=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), drop_path_rate=0.0)
    theirs.eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    file = saved(tmp_path, segmentor(theirs.state_dict()))
    ours, fit = read_into("swin_tiny_patch4_window7_224", file)
    for stage in range(4):
        setattr(theirs, f"norm{stage}", nn.Identity())  # in this harness they belong to the head
    images = torch.rand(1, 3, 224, 224)  # whole windows: mmsegmentation pads others differently
    with torch.no_grad():
        for mine, other in zip(ours(images), theirs(images), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert "norm0 (2 tensors)" in fit.describe()


def test_features_of_mmsegmentations_vit(tmp_path: Path) -> None:
    from mmseg.models.backbones import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(
        img_size=160, embed_dims=64, num_layers=6, num_heads=2, mlp_ratio=3, out_indices=-1, final_norm=True,
        norm_cfg={"type": "LN", "eps": 1e-6},
    )  # fmt: skip
    theirs.eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours, _ = read_into("test_vit", saved(tmp_path, segmentor(theirs.state_dict())))
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(ours(images)[-1], theirs(images)[-1], rtol=1e-3, atol=1e-3)


OPTIONS: Mapping[str, dict[str, Any]] = {
    "test_vit": {"dynamic_img_size": True},
    "swin_tiny_patch4_window7_224": {"strict_img_size": False, "always_partition": True},
}
"""What the families give to timm."""


@pytest.mark.parametrize(
    ("name", "size", "table"),
    [
        ("test_vit", {"img_size": 224}, "pos_embed [1, 197, 64] to [1, 101, 64]"),
        ("swin_tiny_patch4_window7_224", {"window_size": 8}, "relative_position_bias_table"),
    ],
)
def test_tables_of_another_resolution_are_resampled_as_by_timm(
    tmp_path: Path, name: str, size: dict[str, int], table: str
) -> None:
    tensors = network(name, 0, **size).state_dict()
    backbone, fit = read_into(name, saved(tmp_path, tensors))
    source = {"pretrained_cfg_overlay": {"state_dict": dict(tensors)}, "pretrained": True}
    timms = timm.create_model(name, num_classes=0, **TINY[name], **OPTIONS[name], **source)
    assert tensors_digest(backbone) == tensors_digest(families.cut(name, timms))
    assert table in fit.describe()


# Trainings


def test_timms_training_checkpoint_is_loaded_without_its_arguments(tmp_path: Path) -> None:
    state = timm.create_model(RESNET).state_dict()
    ema = {name: tensor + 1 for name, tensor in state.items()}
    content = {
        "epoch": 1, "arch": RESNET, "state_dict": state, "state_dict_ema": ema, "metric": np.float64(0.7),
        "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
    }  # fmt: skip
    found = find_weights(RESNET, str(saved(tmp_path, content, "checkpoint-1.pth.tar")), tmp_path / "cache")
    backbone = load_backbone(RESNET, found, seed=0)
    assert torch.equal(backbone.stages[0][0].conv1.weight, state["layer1.0.conv1.weight"])
    count = sum(not name.startswith("fc.") for name in state)
    assert backbone.notes == (
        f"weights from checkpoint-1.pth.tar, entry state_dict: all {count} tensors matched; left out: fc (2 tensors); "
        "other entries: state_dict_ema",
    )


def test_mmengines_training_checkpoint_is_loaded_without_its_history(tmp_path: Path) -> None:
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer()
    history.update(1.0)
    state = network(RESNET, 0).state_dict()
    content = segmentor(state) | {"message_hub": {"log_scalars": {"train/loss": history}}, "optimizer": {}}
    backbone, _ = read_into(RESNET, saved(tmp_path, content))
    assert torch.equal(backbone.stages[0][0].conv1.weight, state["layer1.0.conv1.weight"])


def test_lightnings_training_checkpoint_is_loaded_without_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "lightning.fabric.utilities.data"
    settings = type("AttributeDict", (dict,), {"__module__": module})
    state = network(RESNET, 0).state_dict()
    with monkeypatch.context() as patch:  # as pickle needs it where the file is written
        for parent in ("lightning", "lightning.fabric", "lightning.fabric.utilities"):
            patch.setitem(sys.modules, parent, ModuleType(parent))
        patch.setitem(sys.modules, module, ModuleType(module))
        patch.setattr(sys.modules[module], "AttributeDict", settings, raising=False)
        content = {"state_dict": under("model.encoder.", state), "hyper_parameters": settings(lr=0.1), "callbacks": {}}
        file = saved(tmp_path, content, "last.ckpt")
    assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == [f"{module}.AttributeDict"]
    backbone, fit = read_into(RESNET, file)
    assert torch.equal(backbone.stages[0][0].conv1.weight, state["layer1.0.conv1.weight"])
    assert "under the prefix model.encoder.*" in fit.describe()


def test_log_says_what_was_matched(tmp_path: Path, colours: Path, tiny: Path) -> None:
    file = saved(tmp_path, {"model": under("backbone.", timm.create_model(RESNET).state_dict())})
    output = call(*run_arguments(colours, tiny, tmp_path / "runs", "--backbone", RESNET, "--weights", file))
    assert output.code == 0, output.err
    log = (Path(output.out.splitlines()[-1]) / "log.txt").read_text()
    for line in (r"weights from w\.pth, entry model: all \d+ tensors matched", "images are normalised with mean 0.485"):
        assert re.search(line, output.err), output.err
        assert re.search(line, log), log


# Refused


def vit_with(**changes: Any) -> State:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return families.create("test_vit", **changes).state_dict()


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "a whole network": (
        RESNET,
        lambda: nn.Linear(2, 2),
        r"refused: not a file of plain tensors, it holds torch.nn.modules.linear.Linear \(loading it could run code\); "
        r"if you trust it, .* save its state_dict\(\) as safetensors$",
    ),
    "infinite numbers under a prefix": (
        "test_vit",
        lambda: under("module.", vit_with() | {"pos_embed": torch.full((1, 197, 64), torch.inf)}),
        "holds tensors that are not finite floating-point numbers: pos_embed$",
    ),
    "other patches": (
        "test_vit",
        lambda: vit_with(patch_size=8),
        r"does not fit test_vit \(\d+ of \d+ tensors do\): of another shape: .*patch_embed.proj.weight \[64, 3, 8, 8\]",
    ),
    "a deeper network": (
        "test_vit",
        lambda: under("backbone.", vit_with(depth=7)),
        r"does not fit test_vit \((\d+) of \1 tensors do\): not of this network: blocks.6.norm1.weight, .* and 9 more$",
    ),
    "registers": (
        "test_vit",
        lambda: vit_with() | {"register_tokens": torch.ones(1, 4, 64), "mask_token": torch.ones(1, 64)},
        "not of this network: ",
    ),
    "no final norm where it is used": (
        "test_vit",
        lambda: {name: tensor for name, tensor in vit_with().items() if not name.startswith("norm.")},
        r"missing: norm.weight, norm.bias$",
    ),
    "less than the network under a prefix": (
        "test_vit",
        lambda: {f"backbone.{name}": tensor for name, tensor in vit_with().items() if "5.norm2" not in name},
        r"missing: blocks.5.norm2.weight, blocks.5.norm2.bias$",
    ),
    "two halves under two prefixes": (
        "test_vit",
        lambda: {
            ("net." if name.startswith("norm") else "encoder.") + name: tensor for name, tensor in vit_with().items()
        },
        r"missing: norm.weight, norm.bias$",
    ),
    "another network": (
        "resnet18",
        lambda: timm.create_model("resnet10t").state_dict(),
        "does not fit resnet18 .*; it fits resnet10t$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, complaint = REFUSED[case]
    file = saved(tmp_path, content())
    with pytest.raises(UserError) as caught:
        load_backbone(name, Weights("sha256:0", str(file), file), seed=0)
    line = caught.value.for_command_line()
    assert line.startswith(f"--weights {file}: ")
    assert re.search(complaint, line), line
    assert "\n" not in line


def test_mismatch_is_refused_before_there_is_a_run(tmp_path: Path, colours: Path, tiny: Path) -> None:
    file, runs = saved(tmp_path, {"teacher": under("module.", vit_with())}), tmp_path / "runs"
    line = refusal(*run_arguments(colours, tiny, runs, "--backbone", RESNET, "--weights", file))
    assert re.search(r"does not fit resnet10t \(0 of \d+ tensors do\): missing: conv1.0.weight", line)
    assert runs_in(runs) == []


def test_arrays_and_programs_are_refused_with_a_remedy(tmp_path: Path) -> None:
    arrays, program = tmp_path / "w.npz", tmp_path / "w.pt"
    np.savez(arrays, cls=np.zeros(3))
    with pytest.raises(UserError, match="file of NumPy arrays, which is not read; load it with timm's load_pretrained"):
        read_checkpoint(arrays)
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), program)
    with pytest.raises(UserError, match=r"TorchScript program .*; if you trust it, save torch\.jit\.load"):
        read_checkpoint(program)


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.exec", "os.system", "posix.system", "subprocess.Popen"])
def test_a_name_that_can_run_code_has_no_placeholder(tmp_path: Path, name: str) -> None:
    proof, file = tmp_path / "proof", tmp_path / "w.pth"
    module, function = name.rsplit(".", 1)
    code = {"eval": f"open({str(proof)!r}, 'w')", "exec": f"open({str(proof)!r}, 'w')"}.get(function, f"touch {proof}")
    pickled = b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"X" + len(code).to_bytes(4, "little") + code.encode()
    file.write_bytes(pickled + b"\x85R.")
    with pytest.raises(UserError, match=r"refused: not a file of plain tensors|not a complete checkpoint"):
        read_checkpoint(file)
    assert not proof.exists()


def test_placeholder_of_getattr_finds_nothing(tmp_path: Path) -> None:
    """mmengine's files name `getattr`: what is read in its place must not reach into any object."""
    from harness.models.backbones.tensor_files import _PLACEHOLDERS

    stand_in = _PLACEHOLDERS["builtins.getattr"]
    assert stand_in is not getattr
    assert type(stand_in("text", "upper")) is stand_in
