"""Which pre-trained weights are on this machine: in a package, or in the cache of the hub or of torch. No network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.models.backbones.packaged import PACKAGED


def local_weights(backbones: Sequence[str]) -> dict[str, dict[str, str]]:
    """Backbone -> `weights` (value of `--weights`) and `source` (their place), for backbones with local weights."""
    import timm
    import torch
    from huggingface_hub import constants

    hub, checkpoints = Path(constants.HF_HUB_CACHE), Path(torch.hub.get_dir()) / "checkpoints"
    found: dict[str, dict[str, str]] = {}
    for backbone in backbones:
        config = timm.models.get_pretrained_cfg(backbone)
        if config is None:
            continue
        if config.hf_hub_id and _in_hub_cache(hub, config.hf_hub_id):
            found[backbone] = {"weights": "auto", "source": f"cache of the hub, {hub}"}
        elif config.url and (checkpoints / config.url.rpartition("/")[2]).is_file():
            found[backbone] = {"weights": "auto", "source": f"cache of torch, {checkpoints}"}
    for name, packaged in PACKAGED.items():
        if packaged.architecture in backbones and packaged.find() is not None:
            weights = "auto" if packaged.tag else f"package:{name}"
            found[packaged.architecture] = {"weights": weights, "source": f"package {name}"}
    return found


def _in_hub_cache(hub: Path, repository: str) -> bool:
    """Whether a snapshot of the repository holds a file of weights; broken links do not count."""
    snapshots = hub / f"models--{repository.replace('/', '--')}" / "snapshots"
    return any(path.suffix in (".safetensors", ".bin", ".pth") and path.exists() for path in snapshots.glob("*/*"))
