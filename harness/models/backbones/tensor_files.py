"""Named tensors of checkpoint files: reading them safely, and loading them into a timm network.

Torch is imported on use only: `packaged.py`, which needs this, is imported without it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.util.text import list_some

if TYPE_CHECKING:
    from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a checkpoint file: safetensors, or torch's format without arbitrary objects.

    Raises `UserError`, of the field `weights`; a pickle that would run code is refused, not loaded.
    """
    import pickle
    import warnings

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors" or _looks_like_safetensors(path):
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # torch warns about a foreign pickle before it is refused here
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"not a safetensors file: {error}", field="weights", value=path) from error
    except pickle.UnpicklingError as error:
        problem = "refused: not a file of plain tensors (loading it could run code)"
        hint = "convert it to safetensors if you trust it"
        raise UserError(problem, field="weights", value=path, hint=hint) from error
    except OSError as error:
        raise UserError(os.strerror(error.errno or 0), field="weights", value=path) from error
    except Exception as error:  # torch raises many kinds of errors for truncated and other files
        problem = "not a complete checkpoint of torch"
        raise UserError(problem, field="weights", value=path, hint="get the file again") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    named = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    )
    if not named or not content:
        raise UserError("holds no named tensors (a state dict is expected)", field="weights", value=path)
    return content


def _looks_like_safetensors(path: Path) -> bool:
    """By content, not by name: an eight-byte length, then JSON. Zip archives and pickles start differently."""
    with path.open("rb") as handle:
        return handle.read(9)[8:] == b"{"


def load_into(network: Any, tensors: dict[str, Tensor], origin: str) -> None:
    """Load a checkpoint's tensors into a timm network without classifier; the checkpoint's classifier is left out.

    `origin` is the user's value of `weights`, for messages. Raises `UserError` that names the tensors that are missing,
    unknown, of another shape, or not finite. Batch norms' counters may be missing: older checkpoints lack them, and
    they are not used.
    """
    import torch

    classifier = network.pretrained_cfg.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(tuple(f"{c}." for c in classifiers))}
    expected = network.state_dict()
    missing = [name for name in expected if name not in tensors and not name.endswith(".num_batches_tracked")]
    shared = {name: (tensors[name], own) for name, own in expected.items() if name in tensors}
    misshapen = [
        f"{name} {list(tensor.shape)} for {list(own.shape)}"
        for name, (tensor, own) in shared.items()
        if tensor.shape != own.shape
    ]
    no_numbers = [n for n, (tensor, own) in shared.items() if own.is_floating_point() and not _is_finite(tensor)]
    problems = [
        ("missing", missing),
        ("not of this network", [name for name in tensors if name not in expected]),
        ("of another shape", misshapen),
        ("not finite floating-point numbers", no_numbers),
    ]
    found = [f"{problem}: {list_some(names)}" for problem, names in problems if names]
    if found:
        architecture = network.pretrained_cfg.get("architecture", "the backbone")
        problem = f"does not fit {architecture}: {'; '.join(found)}"
        raise UserError(problem, field="weights", value=origin)
    with torch.no_grad():
        network.load_state_dict({name: tensors.get(name, own).to(own.dtype) for name, own in expected.items()})


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())
