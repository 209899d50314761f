"""The delta: the trained tensors and the header to rebuild the adapted network from the public backbone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness.data.base import RGB, Bands
from harness.errors import UserError, located
from harness.method import methods
from harness.models.backbones.tensor_files import ImageNorm
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
    bands: Bands = RGB
    """How the channels of images become RGB, as the dataset states it."""
    codes: tuple[int, ...] | None = None
    """The value of each class in the dataset's masks; None: its index, or not recorded by an earlier version."""
    stated_norm: ImageNorm | None = None
    """As `StagedBackbone.stated_norm` in training, whatever file the weights are loaded from."""


def save_delta(path: Path, network: Segmenter, header: DeltaHeader) -> int:
    """Write the delta atomically; returns its size in bytes."""
    from safetensors.torch import save

    fields = {**asdict(header), "spec": header.spec.model_dump(mode="json"), **header.bands._asdict()}
    # Fields that were added later are only written if they are stated, so that other deltas keep their size.
    unstated = {name for name in ("range", "bands", "codes", "stated_norm") if fields[name] is None}
    fields = {name: value for name, value in fields.items() if name not in unstated}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.delta_state().items()}
    with atomically(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": FORMAT, "header": json.dumps(fields)}))
    return path.stat().st_size


def read_delta_header(path: Path) -> DeltaHeader:
    """Read the header of a delta. Raises `UserError` for any other file."""
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
        if len(fields.get("codes") or fields["classes"]) != len(fields["classes"]):
            raise ValueError(f"{len(fields['codes'])} label codes for {len(fields['classes'])} classes")
        return DeltaHeader(
            spec=Spec.model_validate(fields["spec"]),
            classes=tuple(fields["classes"]),
            palette=tuple((r, g, b) for r, g, b in fields["palette"]),
            scale=None if fields["scale"] is None else (fields["scale"][0], fields["scale"][1]),
            backbone_sha256=fields["backbone_sha256"],
            bands=_bands(fields.get("range"), fields.get("bands")),
            stated_norm=_norm(fields.get("stated_norm")),
            codes=None if fields.get("codes") is None else tuple(map(int, fields["codes"])),
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{path}: not a delta: {' '.join(str(error).split())[:200]}") from error


def _bands(range_: Sequence[float] | None, bands: Sequence[int] | None) -> Bands:
    """Raises `ValueError` for values that `dataset.yaml` does not accept either."""
    if range_ is not None and not range_[0] < range_[1]:
        raise ValueError(f"invalid range {range_}")
    if bands is not None and (len(bands) not in (1, 3) or min(bands) < 1):
        raise ValueError(f"invalid bands {bands}")
    return Bands(
        None if range_ is None else (float(range_[0]), float(range_[1])), None if bands is None else tuple(bands)
    )


def _norm(values: Sequence[Sequence[float]] | None) -> ImageNorm | None:
    if values is None:
        return None
    mean, std = (tuple(map(float, one)) for one in values)
    if not len(mean) == len(std) == 3 or min(std) <= 0:
        raise ValueError(f"invalid norm {values}")
    return ImageNorm(mean, std)


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
    backbone.stated_norm = header.stated_norm
    try:
        with located(path):
            network = build_segmenter(backbone, method, spec.head, len(header.classes), spec.seed)
        network.load_trained_state(load_file(path))
    except (ValueError, UnsupportedMethod) as error:
        raise UserError(f"{path}: does not fit {spec.method} on {spec.backbone}: {error}") from error
    with torch.no_grad():
        network.eval()
    return network, header
