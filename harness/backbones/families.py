"""One short function a family: how a timm network of that class is cut into stem and stages.

A family is a timm module (`timm.models.resnet`, ...): every network that the module registers shares the class.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from harness.backbones.staged import StagedBackbone
from harness.errors import UserError, did_you_mean

Cut = Callable[[nn.Module], dict[str, Any]]
_families: dict[str, Cut] = {}


def family(*timm_modules: str) -> Callable[[Cut], Cut]:
    """Register how the networks of these timm modules are cut; the function returns `StagedBackbone`'s arguments."""

    def add(cut: Cut) -> Cut:
        for module in timm_modules:
            if module in _families:
                raise ValueError(f"the family of timm.models.{module} is registered already")
            _families[module] = cut
        return cut

    return add


def families() -> list[str]:
    return sorted(_families)


def backbone_names(family_name: str | None = None) -> list[str]:
    """Every timm architecture that can be used, without pre-training tags."""
    modules = [family_name] if family_name else families()
    return sorted({name for module in modules for name in timm.list_models(module=module)})


def check_backbone(name: str) -> None:
    """Raises `UserError` with the families and the nearest name where `name` (`arch` or `arch.tag`) is not usable."""
    architecture = name.split(".")[0]
    supported = backbone_names()
    if architecture not in supported:
        known = "is a timm network of no family that is cut into stages" if timm.is_model(architecture) else "unknown"
        raise UserError(
            f"--backbone {name}: {known}; {did_you_mean(architecture, supported)} (families: {', '.join(families())})"
        )
    if "." in name and name not in timm.list_models(architecture + ".*", pretrained=True):
        tags = timm.list_models(architecture + ".*", pretrained=True)
        raise UserError(f"--backbone {name}: no such pre-training tag; {did_you_mean(name, tags)}")


def create(name: str) -> nn.Module:
    """The timm network of that name with random weights and no classifier. Transformers take images of any size."""
    check_backbone(name)
    options = {"dynamic_img_size": True, "dynamic_img_pad": True} if _module_of(name) in _TRANSFORMERS else {}
    return timm.create_model(name, pretrained=False, num_classes=0, **options)


def cut(name: str, network: nn.Module) -> StagedBackbone:
    """Cut a timm network into a frozen `StagedBackbone`."""
    config = network.pretrained_cfg
    parts = _families[_module_of(name)](network)
    return StagedBackbone(name, mean=config["mean"], std=config["std"], **parts)


def _module_of(name: str) -> str:
    architecture = name.split(".")[0]
    return next(module for module in families() if architecture in timm.list_models(module=module))


@family("resnet")
def _resnet(network: nn.Module) -> dict[str, Any]:
    """ResNet, ResNeXt, Wide ResNet, ResNet-D, SE and ECA variants: He et al., arXiv 1512.03385, and successors."""
    features = network.feature_info[-4:]
    return {
        "stem": nn.Sequential(network.conv1, network.bn1, network.act1, network.maxpool),
        "stages": [network.layer1, network.layer2, network.layer3, network.layer4],
        "channels": [feature["num_chs"] for feature in features],
        "strides": [feature["reduction"] for feature in features],
    }


@family("efficientnet", "mobilenetv3")
def _efficientnet(network: nn.Module) -> dict[str, Any]:
    """EfficientNet (lite included), MobileNetV2, V3 and V4, and what else is built of timm's `blocks`.

    A stage ends with the last block at its resolution; the block at stride 2 belongs to the first stage, the 1×1
    convolution that widens for the classifier to none, as in timm's own `features_only`.
    """
    features = [feature for feature in network.feature_info if feature["reduction"] >= 4]
    ends = [int(re.fullmatch(r"blocks\.(\d+)", feature["module"])[1]) + 1 for feature in features]
    starts = [0, *ends[:-1]]
    return {
        "stem": nn.Sequential(network.conv_stem, network.bn1),
        "stages": [network.blocks[start:end] for start, end in zip(starts, ends, strict=True)],
        "channels": [feature["num_chs"] for feature in features],
        "strides": [feature["reduction"] for feature in features],
    }


class _TokenStem(nn.Module):
    """Image -> tokens [B, prefix + patches, C], with position embeddings interpolated to the image's grid."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        x = self.network.patch_embed(images)
        return self.network.norm_pre(self.network.patch_drop(self.network._pos_embed(x)))


@family("vision_transformer", "deit")
def _vision_transformer(network: nn.Module) -> dict[str, Any]:
    """ViT, DeiT, DeiT-3, CLIP, MAE and DINOv2 layouts: Dosovitskiy et al., arXiv 2010.11929, and successors.

    One resolution: the blocks are cut into four equal groups. The final norm is applied to each group's output.
    """
    blocks, norm = network.blocks, network.norm
    network.blocks, network.norm, network.head = nn.Sequential(), nn.Identity(), nn.Identity()
    bounds = [round(len(blocks) * k / 4) for k in range(5)]
    return {
        "stem": _TokenStem(network),
        "stages": [blocks[start:end] for start, end in itertools.pairwise(bounds)],
        "channels": [network.embed_dim] * 4,
        "strides": [network.patch_embed.patch_size[0]] * 4,
        "layout": "NLC",
        "prefix_tokens": network.num_prefix_tokens,
        "output_norm": norm,
    }


_TRANSFORMERS = frozenset({"vision_transformer", "deit"})


def load_into(network: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Load a checkpoint's tensors into a timm network without classifier; the checkpoint's classifier is left out.

    Raises `UserError` that counts and names the tensors that are missing, not known, or of another shape.
    """
    classifier = network.pretrained_cfg.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(tuple(f"{c}." for c in classifiers))}
    wanted = network.state_dict()
    problems = _name_some("missing", [name for name in wanted if name not in tensors])
    problems += _name_some("not of this network", [name for name in tensors if name not in wanted])
    problems += _name_some(
        "of another shape",
        [
            f"{name} {list(tensors[name].shape)} for {list(wanted[name].shape)}"
            for name in wanted
            if name in tensors and tensors[name].shape != wanted[name].shape
        ],
    )
    if problems:
        architecture = network.pretrained_cfg.get("architecture", "the backbone")
        raise UserError(f"{origin}: does not fit {architecture}: {'; '.join(problems)}")
    with torch.no_grad():
        network.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted})


def _name_some(what: str, names: Sequence[str], limit: int = 3) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{what}: {', '.join(names[:limit])}{more}"]
