"""Named tensors of checkpoint files, read without running code that a file holds.

`matching.py` finds which tensors of a network they are. Torch is imported on use only: `packaged.py`, which needs this
module, is imported without it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CONTAINERS = (
    *("state_dict", "model", "model_state_dict", "model_state", "teacher", "model_ema", "state_dict_ema", "ema"),
    *("ema_state_dict", "ema_model", "module", "net", "network", "backbone", "encoder", "target_encoder", "student"),
    *("weights", "params"),
)
"""Entries of checkpoints that hold a state dict; where there are several, the first of these is read."""


class ImageNorm(NamedTuple):
    """Mean and std of images, RGB in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in self)
        return f"mean {mean} and std {std}"


@dataclass(frozen=True)
class Checkpoint:
    """The named tensors of a file."""

    tensors: dict[str, Tensor]
    container: str = ""
    """The entry that holds them, `a.b` where nested; empty if they are the file's own."""
    others: tuple[str, ...] = ()
    """Further entries that hold tensors and were not read."""
    norm: ImageNorm | None = None
    """The mean and std by which the training images were normalised, if the file states them."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `read_checkpoint`."""
    return read_checkpoint(path).tensors


def read_checkpoint(path: Path) -> Checkpoint:
    """Named tensors of a checkpoint file: safetensors, or torch's format.

    Raises `UserError`, of the field `weights`; a pickle that would run code is refused, not loaded. Entries that are
    not tensors, such as a training's arguments, are left out.
    """
    import pickle
    import warnings

    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors" or _looks_like_safetensors(path):
            with safe_open(path, "pt") as opened:
                return Checkpoint(load_file(path), norm=_stated_norm(opened.metadata()))
        placeholders = [(stand_in, name) for name, stand_in in _PLACEHOLDERS.items()]
        # torch warns about a foreign pickle before it is refused here
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(placeholders):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"not a safetensors file: {error}", field="weights", value=path) from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        held = f", it holds {named[1]}" if named else ""
        problem = f"refused: not a file of plain tensors{held} (loading it could run code)"
        hint = "if you trust it, load it where it was written and save its state_dict() as safetensors"
        raise UserError(problem, field="weights", value=path, hint=hint) from error
    except OSError as error:
        raise UserError(os.strerror(error.errno or 0), field="weights", value=path) from error
    except Exception as error:  # torch raises many kinds of errors for truncated and other files
        raise _unreadable(path, error) from error
    found = _unwrap(content)
    if found is None:
        raise UserError("holds no named tensors (a state dict is expected)", field="weights", value=path)
    return replace(found, norm=_stated_norm(content))


def _looks_like_safetensors(path: Path) -> bool:
    """By content, not by name: an eight-byte length, then JSON. Zip archives and pickles start differently."""
    with path.open("rb") as handle:
        return handle.read(9)[8:] == b"{"


def _unreadable(path: Path, error: Exception) -> UserError:
    if path.suffix in (".npz", ".npy"):
        problem = "is a file of NumPy arrays, which is not read"
        hint = "load it with timm's load_pretrained and save the network's state_dict() as safetensors"
    elif "TorchScript" in str(error):
        problem = "is a TorchScript program (loading it could run code)"
        hint = "if you trust it, save torch.jit.load(FILE).state_dict() as safetensors"
    else:
        problem, hint = "not a complete checkpoint of torch", "get the file again"
    return UserError(problem, field="weights", value=path, hint=hint)


def _unwrap(content: Any) -> Checkpoint | None:
    """The tensors of the first container that has any, or else of the entries themselves; None if there are none."""
    import torch

    if not isinstance(content, dict):
        return None
    inside = {key: found for key in CONTAINERS if (found := _unwrap(content.get(key))) is not None}
    for key, found in inside.items():
        container = f"{key}.{found.container}".rstrip(".")
        return Checkpoint(found.tensors, container, (*found.others, *(other for other in inside if other != key)))
    tensors = {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}
    return Checkpoint(tensors) if tensors else None


def _stated_norm(entries: Any) -> ImageNorm | None:
    """`mean` and `std` among a file's entries, or in timm's `pretrained_cfg`, or in a training's arguments.

    In the metadata of safetensors they are JSON. Values above 1 are of images in 0..255.
    """
    if isinstance(entries, _Placeholder):
        entries = entries.state
    if not isinstance(entries, Mapping):
        return None
    mean, std = (_numbers(entries.get(name)) for name in ("mean", "std"))
    if len(mean) == len(std) == 3 and min(mean) >= 0 and min(std) > 0:
        unit = 255 if max(*mean, *std) > 1 else 1
        return ImageNorm(tuple(value / unit for value in mean), tuple(value / unit for value in std))
    inside = (_stated_norm(entries.get(name)) for name in ("pretrained_cfg", "args"))
    return next((norm for norm in inside if norm is not None), None)


def _numbers(value: Any) -> tuple[float, ...]:
    """Empty for anything but finite numbers."""
    try:
        numbers = tuple(map(float, json.loads(value) if isinstance(value, str) else value))
    except (TypeError, ValueError):
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()


class _Placeholder:
    """Stands for an object that a checkpoint holds besides its tensors."""

    state: object = None
    """The attributes of the object."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Entries:
    """The same for objects that take entries as a dictionary does."""

    def __new__(cls, *args: object) -> Any:
        return OrderedDict()


_PLACEHOLDERS: dict[str, type] = {
    **dict.fromkeys(
        [
            "argparse.Namespace",
            "builtins.getattr",  # of mmengine's HistoryBuffer, for its methods
            *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "bool", "str")),
            "mmengine.logging.history_buffer.HistoryBuffer",
            *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
            "numpy.dtype",
            "numpy.ndarray",
            "omegaconf.base.ContainerMetadata",
            "omegaconf.base.Metadata",
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            "omegaconf.nodes.AnyNode",
            *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
            "typing.Any",
        ],
        _Placeholder,
    ),
    **dict.fromkeys(
        [
            "addict.addict.Dict",
            "collections.defaultdict",
            "lightning.fabric.utilities.data.AttributeDict",
            "lightning_fabric.utilities.data.AttributeDict",
            "mmengine.config.config.ConfigDict",
            "pytorch_lightning.utilities.parsing.AttributeDict",
        ],
        _Entries,
    ),
}
"""Objects that trainings store beside their tensors, by name. None of their code runs, and none is imported: each is
read as a placeholder. A file with any other object is refused."""
