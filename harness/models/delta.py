"""The delta: the trained tensors and the header to rebuild the adapted network from the public backbone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness.errors import UserError, located
from harness.method import methods
from harness.models.backbones.weights import find_weights, load_backbone, tensors_digest, to_ask_for
from harness.models.network import Segmenter, UnsupportedMethod, build_segmenter
from harness.spec import PROTOCOL, Spec
from harness.util.files import atomically
from harness.util.seeds import derive

FORMAT = "harness-delta-1"
_LARGEST_SIDE = 32_768  # pixels


@dataclass(frozen=True)
class DeltaHeader:
    """The header of a delta."""

    spec: Spec
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    scale: tuple[int, int] | None
    backbone_sha256: str
    """Checksum of the backbone's pre-trained tensors; a rebuilt backbone must have the same."""


def save_delta(path: Path, network: Segmenter, header: DeltaHeader) -> int:
    """Write the delta atomically; returns its size in bytes."""
    from safetensors.torch import save

    fields = {**asdict(header), "spec": header.spec.model_dump(mode="json")}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.delta_state().items()}
    with atomically(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": FORMAT, "header": json.dumps(fields)}))
    return path.stat().st_size


def read_delta_header(path: Path) -> DeltaHeader:
    """Read a delta. Raises `UserError` for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError("it has no delta header")
        fields = json.loads(metadata["header"])
        if not all(0 <= value <= 255 for colour in fields["palette"] for value in colour):
            raise ValueError("its palette has values outside 0..255")
        if not len(fields["palette"]) == len(fields["classes"]) <= 255:
            raise ValueError(f"{len(fields['classes'])} classes and {len(fields['palette'])} colours")
        if fields["scale"] is not None and not 1 <= min(fields["scale"]) <= max(fields["scale"]) <= _LARGEST_SIDE:
            raise ValueError(f"invalid scale {fields['scale']}")
        return DeltaHeader(
            spec=Spec.model_validate(fields["spec"]),
            classes=tuple(fields["classes"]),
            palette=tuple((r, g, b) for r, g, b in fields["palette"]),
            scale=None if fields["scale"] is None else (fields["scale"][0], fields["scale"][1]),
            backbone_sha256=fields["backbone_sha256"],
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{path}: not a delta: {' '.join(str(error).split())[:200]}") from error


def load_delta(path: Path, weights: str, cache: Path) -> tuple[Segmenter, DeltaHeader]:
    """The adapted network, in evaluation mode: the public backbone with its pre-trained weights, then the delta.

    `weights` locates the backbone's weights, as `--weights` does. Raises `UserError` if the delta was trained with
    other weights.
    """
    from safetensors.torch import load_file

    header = read_delta_header(path)
    spec = header.spec
    if spec.protocol != PROTOCOL:
        raise UserError(
            f"{path}: was trained by protocol {spec.protocol}, and this version builds the networks of protocol "
            f"{PROTOCOL}; run it again, or use the version that trained it"
        )
    with located(path):
        method_class = methods.get(spec.method)
        method = method_class(method_class.Hyperparameters.parse(spec.method, spec.hyperparameters))
    try:
        known = to_ask_for(spec.weights) if weights == "auto" or spec.weights == "random" else None
        found = find_weights(spec.backbone, known or weights, cache)
        backbone = load_backbone(spec.backbone, found, derive(spec.seed, "backbone"))
    except UserError as error:
        if error.field == "backbone":
            raise error.at(path) from None
        if weights != "auto" or not spec.weights.startswith("sha256:"):
            raise
        raise UserError(
            f"{path}: was trained on {spec.backbone} with a file of weights, {spec.weights}; "
            "pass that file with --weights PATH"
        ) from error
    if tensors_digest(backbone) != header.backbone_sha256:
        raise UserError(
            f"{path}: was trained on {spec.backbone} with weights {spec.weights}, and --weights {weights} gives "
            f"{found.identity}; pass the same file with --weights PATH"
        )
    try:
        with located(path):
            network = build_segmenter(backbone, method, spec.head, len(header.classes), spec.seed)
        network.load_trained_state(load_file(path))
    except (ValueError, UnsupportedMethod) as error:
        raise UserError(f"{path}: does not fit {spec.method} on {spec.backbone}: {error}") from error
    with torch.no_grad():
        network.eval()
    return network, header
