"""The provenance of a result: code, packages, device."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import harness

PACKAGES = (
    "torch", "torchvision", "timm", "onedl-mmsegmentation", "onedl-mmcv", "lightning-fabric", "peft", "numpy", "pillow",
)  # fmt: skip


def code() -> dict[str, Any]:
    """Version, commit and whether the checkout is dirty; commit is None outside of a checkout."""
    return {"harness": harness.__version__, "commit": _git("rev-parse", "HEAD"), "dirty": _dirty()}


@cache
def packages() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}


@cache
def sources(*packages: str) -> str:
    """Hex SHA-256 of the Python sources of packages, by their names."""
    state = hashlib.sha256()
    for package in packages:
        root = Path(str(resources.files(package)))
        for path in sorted(root.rglob("*.py")):
            state.update(f"{package}/{path.relative_to(root).as_posix()}".encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device_name(device: Any) -> str:
    """The accelerator's name, or the processor's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _dirty() -> bool | None:
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
