"""The backbone families, one file each: every `Family` that a module of this package defines is registered.

This module turns a name into a timm network, and that into a `StagedBackbone`. Details of a family are in its file.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Any

import timm
import timm.layers.pos_embed
import torch
from torch import Tensor, nn

from harness.errors import UserError, did_you_mean
from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.family import Family, TinyNetwork
from harness.models.backbones.matching import Renaming
from harness.models.resampling import resample_in

_families: dict[str, Family] = {}


def register(family: type[Family]) -> type[Family]:
    """Register a family under its timm modules; a decorator for families that are defined elsewhere.

    Raises `ValueError` if one of the modules already has a family.
    """
    for module in family.modules:
        if module in _families:
            raise ValueError(f"the family of timm.models.{module} is already registered")
    _families.update(dict.fromkeys(family.modules, family()))
    return family


def families() -> list[str]:
    """The names of the supported timm modules."""
    return sorted(_families)


def tiny_networks() -> dict[str, TinyNetwork]:
    """timm module -> its tiny network, for tests that every family must pass."""
    return {module: _families[module].modules[module] for module in families()}


def backbone_names(family_name: str | None = None) -> list[str]:
    """Every timm architecture that can be used, without pre-training tags."""
    modules = [family_name] if family_name else families()
    return sorted({name for module in modules for name in timm.list_models(module=module)})


def check_backbone(name: str) -> None:
    """Raises `UserError` with the families and the nearest name where `name` (`arch` or `arch.tag`) is not usable."""
    architecture = name.split(".")[0]
    supported = backbone_names()
    if architecture not in supported:
        problem = "is in timm, but its family is not supported" if timm.is_model(architecture) else "unknown"
        hint = f"{did_you_mean(architecture, supported)} (families: {', '.join(families())})"
        raise UserError(problem, field="backbone", value=name, hint=hint)
    if "." in name and name not in timm.list_models(architecture + ".*", pretrained=True):
        tags = timm.list_models(architecture + ".*", pretrained=True)
        raise UserError("no such pre-training tag", field="backbone", value=name, hint=did_you_mean(name, tags))


def create(name: str, **changes: Any) -> Any:
    """The timm network of that name with random weights and no classifier; `changes` are timm's own arguments.

    Raises `UserError` for a name that is not usable.
    """
    check_backbone(name)
    resample_in(timm.layers.pos_embed)
    return timm.create_model(name, pretrained=False, num_classes=0, **{**_family_of(name).options, **changes})


def cut(name: str, network: Any) -> StagedBackbone:
    """Cut a timm network into a frozen `StagedBackbone`."""
    config = network.pretrained_cfg
    family = _family_of(name)
    return StagedBackbone(name, family, family.cut(network), mean=config["mean"], std=config["std"])


def layouts(name: str) -> tuple[Renaming, ...]:
    """How files with the weights of a network name their tensors, besides timm's names."""
    family = _family_of(name)

    def from_openmmlab(tensors: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
        return family.from_published(family.from_openmmlab(tensors), network)

    return family.from_published, from_openmmlab


@cache
def unused_tensors(name: str) -> frozenset[str]:
    """The tensors of a timm network that its backbone does not have: those between its last stage and the classifier.

    Files of self-supervised pre-training and of segmentation may lack them.
    """
    with torch.device("meta"):
        network = create(name)
    before = {tensor_name: id(tensor) for tensor_name, tensor in network.state_dict(keep_vars=True).items()}
    parts = _family_of(name).cut(network)
    modules = nn.ModuleList([parts.stem, *parts.stages, parts.output_norm or nn.Identity()])
    used = {id(tensor) for tensor in modules.state_dict(keep_vars=True).values()}
    return frozenset(tensor_name for tensor_name, identity in before.items() if identity not in used)


def similar_networks(name: str, limit: int = 12) -> Iterator[tuple[str, Any]]:
    """The names of the same family that are nearest to a name, with their networks on torch's meta device."""
    architecture, family = name.split(".")[0], _family_of(name)
    parts = set(architecture.split("_"))

    def distance(other: str) -> tuple[int, float]:
        theirs = set(other.split("_"))
        alike = difflib.SequenceMatcher(None, architecture, other).ratio()
        return max(len(parts - theirs), len(theirs - parts)), -alike

    names = [other for module in family.modules for other in timm.list_models(module=module) if other != architecture]
    for other in sorted(names, key=distance)[:limit]:
        with torch.device("meta"):
            network = create(other)
        yield other, network


def _family_of(name: str) -> Family:
    architecture = name.split(".")[0]
    return next(_families[module] for module in families() if architecture in timm.list_models(module=module))


def _load_families() -> None:
    for found in pkgutil.iter_modules(__path__, f"{__name__}."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, type) and issubclass(value, Family) and value.__module__ == found.name:
                register(value)


_load_families()
