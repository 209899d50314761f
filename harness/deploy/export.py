"""Exports the adapted network: a state dict with a JSON recipe, TorchScript, or ONNX.

Merging folds a method's trained tensors into the backbone's own layers: inference costs no more than the backbone.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from harness.deploy.predict import find_delta
from harness.errors import UserError
from harness.method import methods
from harness.models.delta import DeltaHeader, load_delta
from harness.models.network import Segmenter
from harness.runs.store import RunStore
from harness.util.files import atomically, write_text

Format = Literal["safetensors", "torchscript", "onnx"]
SUFFIXES = (".safetensors", ".pt", ".onnx")
TOLERANCE = 1e-4
"""Largest allowed difference of a merged or traced network's logits, relative to the largest logit."""


def export(store: RunStore, run: str, out: Path, format: Format, merge: bool, weights: str | None) -> list[Path]:
    """Write the adapted network of a run (folder, fingerprint or delta file) to the folder `out`; returns the files.

    Merged and traced networks are compared with the trained network before they are written. TorchScript and ONNX take
    images of the budget's crop size only. Raises `UserError`.
    """
    delta, run_weights = find_delta(store, run)
    network, header = load_delta(delta, weights or run_weights, store.cache)
    images = _random_images(header.spec.budget.crop)
    with torch.inference_mode():
        expected = network(images)
    if merge:
        _merge(network, images, expected)
    name = f"{header.spec.method}-{header.spec.backbone}-{header.spec.dataset}"
    _check_own(out / f"{name}.json", header.spec.fingerprint)
    recipe = _recipe(network, header, merge)
    if format == "safetensors":
        written = _write_tensors(network, out / f"{name}.safetensors")
    elif format == "torchscript":
        written = _write_torchscript(network, images, expected, out / f"{name}.pt")
    else:
        written = _write_onnx(network, images, out / f"{name}.onnx")
    recipe["file"] = written.name
    recipe["size"] = "any" if format == "safetensors" else list(images.shape[-2:])
    write_text(out / f"{name}.json", json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
    return [written, out / f"{name}.json"]


def _check_own(recipe: Path, fingerprint: str) -> None:
    """Raises `UserError` if files of this name exist that are not an export of the same run."""
    there = [path for path in (recipe, *map(recipe.with_suffix, SUFFIXES)) if path.exists()]
    if not there:
        return
    try:
        own = json.loads(recipe.read_bytes())["fingerprint"] == fingerprint
    except (OSError, ValueError, TypeError, KeyError):
        own = False
    if not own:
        raise UserError(f"{there[0]}: exists and is not an export of this run; choose another folder with --out")


def load_exported(folder: Path) -> nn.Module:
    """The network that `export` wrote as safetensors: images [B, 3, H, W], normalised -> logits. No weights needed."""
    from safetensors.torch import load_file

    from harness.models.backbones.weights import Weights, load_backbone
    from harness.models.network import build_segmenter

    (recipe_path,) = folder.glob("*.json")
    recipe = json.loads(recipe_path.read_text(encoding="utf-8"))
    method_name = "linear" if recipe["merged"] else recipe["method"]
    method = methods.get(method_name)
    settings = {} if recipe["merged"] else recipe["hyperparameters"]
    network = build_segmenter(
        load_backbone(recipe["backbone"], Weights("random", "random"), seed=0),
        method(method.Hyperparameters.parse(method_name, settings)),
        recipe["head"],
        len(recipe["classes"]),
        seed=0,
    )
    tensors = load_file(folder / recipe["file"])
    parameters = network.state_dict()
    for name in tensors.keys() - parameters.keys():  # merging adds a bias to layers without one
        owner, _, parameter = name.rpartition(".")
        network.get_submodule(owner).register_parameter(parameter, nn.Parameter(torch.empty_like(tensors[name])))
    network.load_state_dict(tensors)
    return network.eval()


def _merge(network: Segmenter, images: torch.Tensor, expected: torch.Tensor) -> None:
    method = network.method
    if not method.mergeable:
        able = ", ".join(name for name in methods.names() if methods.get(name).mergeable)
        raise UserError(f"--merge: {method.name} cannot be merged; these methods can: {able}")
    with torch.no_grad():
        method.merge(network.backbone)
    with torch.inference_mode():
        _compare(network(images), expected, "the merged network")


def _compare(logits: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raises `RuntimeError` where the logits [B, classes, h, w] differ by more than `TOLERANCE`."""
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{what} differs from the trained one by {difference:.2g} of its largest logit")


def _random_images(size: tuple[int, int]) -> torch.Tensor:
    """[1, 3, H, W], the same at every call."""
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


def _recipe(network: Segmenter, header: DeltaHeader, merged: bool) -> dict[str, Any]:
    spec, backbone = header.spec, network.backbone
    return {
        "input": "float32 [B, 3, H, W], RGB in 0..1, minus mean, over std",
        "mean": backbone.mean,
        "std": backbone.std,
        "output": "logits [B, classes, h, w] of the canvas: H, W rounded up to multiples of canvas_multiple; upsample "
        "bilinearly to the canvas (corners not aligned), crop its upper left H, W, then argmax over classes",
        "canvas_multiple": backbone.canvas((1, 1))[0],
        "classes": header.classes,
        "palette": header.palette,
        "scale": header.scale,
        **header.bands._asdict(),
        "codes": header.codes,
        "merged": merged,
        "method": spec.method,
        "hyperparameters": spec.hyperparameters,
        "backbone": spec.backbone,
        "weights": spec.weights,
        "head": spec.head,
        "fingerprint": spec.fingerprint,
        "load": {
            "safetensors": "harness.deploy.export.load_exported(folder)",
            "torchscript": "torch.jit.load(file)",
            "onnx": "any ONNX runtime",
        },
    }


def _write_tensors(network: Segmenter, path: Path) -> Path:
    from safetensors.torch import save

    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    with atomically(path) as temporary:
        temporary.write_bytes(save(tensors))
    return path


def _write_torchscript(network: Segmenter, images: torch.Tensor, expected: torch.Tensor, path: Path) -> Path:
    with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
        try:
            traced = torch.jit.trace(network, images, check_trace=False)
        except Exception as error:  # the tracer raises errors of many types
            raise UserError(f"--format torchscript: torch cannot trace this network: {_first_line(error)}") from error
        _compare(traced(images), expected, "the traced network")
        with atomically(path) as temporary:
            torch.jit.save(traced, str(temporary))
    return path


def _write_onnx(network: Segmenter, images: torch.Tensor, path: Path) -> Path:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx: {error.name} is not installed; pip install onnx onnxscript") from error
    try:
        with atomically(path) as temporary, warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                network,
                (images,),
                str(temporary),
                input_names=["images"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        raise UserError(f"--format onnx: torch cannot export this network: {_first_line(error)}") from error
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
