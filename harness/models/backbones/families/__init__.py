"""One short function a family: how a timm network of that class is cut into stem and stages.

A family is a timm module (`timm.models.resnet`, ...): every network that the module registers shares the class.
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.errors import UserError, did_you_mean
from harness.models.backbones.backbone import StagedBackbone

Cut = Callable[[nn.Module], dict[str, Any]]


@dataclass(frozen=True)
class _Family:
    cut: Cut
    options: Mapping[str, Any]


_families: dict[str, _Family] = {}


def family(*timm_modules: str, **options: Any) -> Callable[[Cut], Cut]:
    """Register how the networks of these timm modules are cut; the function returns `StagedBackbone`'s arguments.

    `options` are given to timm on creation, so that a network takes images of any size.
    """

    def add(cut: Cut) -> Cut:
        for module in timm_modules:
            if module in _families:
                raise ValueError(f"the family of timm.models.{module} is registered already")
            _families[module] = _Family(cut, options)
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
        known = (
            "is in timm, but its family cannot be cut into stages here" if timm.is_model(architecture) else "unknown"
        )
        hint = f"{did_you_mean(architecture, supported)} (families: {', '.join(families())})"
        raise UserError(known, field="backbone", value=name, hint=hint)
    if "." in name and name not in timm.list_models(architecture + ".*", pretrained=True):
        tags = timm.list_models(architecture + ".*", pretrained=True)
        raise UserError("no such pre-training tag", field="backbone", value=name, hint=did_you_mean(name, tags))


def create(name: str, **changes: Any) -> nn.Module:
    """The timm network of that name with random weights and no classifier; `changes` are timm's own arguments."""
    check_backbone(name)
    options = _families[_module_of(name)].options
    return timm.create_model(name, pretrained=False, num_classes=0, **options | changes)


def cut(name: str, network: nn.Module) -> StagedBackbone:
    """Cut a timm network into a frozen `StagedBackbone`."""
    config = network.pretrained_cfg
    for module in network.modules():
        if isinstance(module, nn.AvgPool2d):  # as anti-aliasing, some drop what is left over at an odd border
            module.ceil_mode = module.ceil_mode or module.padding in (0, (0, 0))
    parts = _families[_module_of(name)].cut(network)
    return StagedBackbone(name, mean=config["mean"], std=config["std"], **parts)


def _module_of(name: str) -> str:
    architecture = name.split(".")[0]
    return next(module for module in families() if architecture in timm.list_models(module=module))


@family("resnet", "res2net", "resnest", "sknet")
def _resnet(network: nn.Module) -> dict[str, Any]:
    """ResNet, ResNeXt, Wide ResNet, ResNet-D, SE and ECA variants: He et al., arXiv 1512.03385, and successors; with
    other blocks Res2Net (1904.01169), ResNeSt (2004.08955) and SKNet (1903.06586)."""
    return {
        "stem": nn.Sequential(network.conv1, network.bn1, network.act1, network.maxpool),
        "stages": [network.layer1, network.layer2, network.layer3, network.layer4],
        **_described(network.feature_info[-4:]),
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
        **_described(features),
    }


@family("regnet")
def _regnet(network: nn.Module) -> dict[str, Any]:
    """RegNet X, Y, Z and V: Radosavovic et al., arXiv 2003.13678. The convolution for the classifier is left out."""
    return {
        "stem": network.stem,
        "stages": [network.s1, network.s2, network.s3, network.s4],
        **_described(network.feature_info[1:]),
    }


class _Padded(nn.Module):
    """Zeros at the lower and right border up to multiples of `multiple`, so that a strided layer drops no pixel."""

    def __init__(self, multiple: int):
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = -x.shape[-2] % self.multiple, -x.shape[-1] % self.multiple
        return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


@family("convnext")
def _convnext(network: nn.Module) -> dict[str, Any]:
    """ConvNeXt, v1 and v2: Liu et al., arXiv 2201.03545; Woo et al., 2301.00808.

    timm's strided convolutions drop what is left over at a map's border; here the border is padded. The final norm
    is the classifier's and left out, as in timm's own `features_only`.
    """
    for stage in network.stages:
        if isinstance(stage.downsample, nn.Sequential):
            norm, convolution = stage.downsample
            stage.downsample = nn.Sequential(OrderedDict({"0": norm, "pad": _Padded(2), "1": convolution}))
    return {
        "stem": nn.Sequential(_Padded(4), network.stem),
        "stages": list(network.stages),
        **_described(network.feature_info),
    }


@family("metaformer")
def _metaformer(network: nn.Module) -> dict[str, Any]:
    """PoolFormer, ConvFormer, CAFormer: Yu et al., arXiv 2111.11418 and 2210.13452. No final norm, as ConvNeXt."""
    return {
        "stem": nn.Sequential(_Padded(4), network.stem),
        "stages": list(network.stages),
        **_described(network.feature_info),
    }


@family("pvt_v2")
def _pvt_v2(network: nn.Module) -> dict[str, Any]:
    """PVTv2, whose encoder is built as SegFormer's MiT is: Wang et al., arXiv 2106.13797. Stages end in their norm."""
    return {"stem": network.patch_embed, "stages": list(network.stages), **_described(network.feature_info)}


@family("swin_transformer", strict_img_size=False, always_partition=True)
def _swin(network: nn.Module) -> dict[str, Any]:
    """Swin Transformer: Liu et al., arXiv 2103.14030.

    Every second block shifts its windows in all stages, also where the pre-training image was one window: as in
    mmsegmentation. No norm on the outputs: mmsegmentation trains new ones there, and the pre-trained one fits the
    last stage alone.
    """
    network.patch_embed.dynamic_img_pad = True
    return {
        "stem": network.patch_embed,
        "stages": list(network.layers),
        "layout": "NHWC",
        **_described(network.feature_info),
    }


@family("swin_transformer_v2", strict_img_size=False)
def _swin_v2(network: nn.Module) -> dict[str, Any]:
    """Swin Transformer V2: Liu et al., arXiv 2111.09883. Windows and shifts of every stage stay as pre-trained."""
    _call_fused_projections(network)
    return _swin(network)


class _TokenStem(nn.Module):
    """Image -> tokens [B, prefix + patches, C], with position embeddings interpolated to the image's grid."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        x = self.network.patch_embed(images)
        return self.network.norm_pre(self.network.patch_drop(self.network._pos_embed(x)))


@family("vision_transformer", "deit", dynamic_img_size=True, dynamic_img_pad=True)
def _vision_transformer(network: nn.Module) -> dict[str, Any]:
    """ViT, DeiT, DeiT-3, CLIP, MAE and DINOv2 layouts: Dosovitskiy et al., arXiv 2010.11929, and successors.

    One resolution: the blocks are cut into four equal groups. The final norm is applied to each group's output.
    """
    groups, described = _quarter(network)
    return {"stem": _TokenStem(network), "stages": groups, **described}


class _Rotary:
    """Rotary position embeddings of the current image's grid: the stem writes, the blocks read. Never copied."""

    embedding: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Rotary, ()


class _RotaryStem(nn.Module):
    """As `_TokenStem`, and computes the rotary embeddings once for all blocks."""

    def __init__(self, network: nn.Module, rotary: _Rotary):
        super().__init__()
        self.network = network
        self.rotary = rotary

    def forward(self, images: Tensor) -> Tensor:
        x, self.rotary.embedding = self.network._pos_embed(self.network.patch_embed(images))
        return self.network.norm_pre(x)

    def prepare(self, size: tuple[int, int]) -> None:
        """What the blocks read of the stem, for a forward pass of images of that size that begins behind a stage."""
        weight = next(self.network.patch_embed.parameters())
        with torch.no_grad():
            self(weight.new_zeros(1, 3, *size))


class _RotaryStage(nn.Module):
    def __init__(self, blocks: nn.Module, rotary: _Rotary, first: int, by_depth: bool):
        """`by_depth`: there is one embedding a block; `first` is the depth of the stage's first."""
        super().__init__()
        self.blocks = blocks
        self.rotary = rotary
        self.first = first
        self.by_depth = by_depth

    def forward(self, x: Tensor) -> Tensor:
        embedding = self.rotary.embedding
        for depth, block in enumerate(self.blocks, self.first):
            x = block(x, rope=embedding[depth] if self.by_depth and embedding is not None else embedding)
        return x


@family("eva", dynamic_img_size=True, dynamic_img_pad=True)
def _eva(network: nn.Module) -> dict[str, Any]:
    """EVA, EVA-02 and what shares timm's class: DINOv3, ViTs with rotary embeddings, Perception Encoder, Sapiens.

    Fang et al., arXiv 2211.07636 and 2303.11331; Siméoni et al., 2508.10104. Cut as a ViT.
    """
    _call_fused_projections(network)
    groups, described = _quarter(network)
    rotary, first, stages = _Rotary(), 0, []
    for group in groups:
        stages.append(_RotaryStage(group, rotary, first, network.rope_mixed))
        first += len(group)
    return {"stem": _RotaryStem(network, rotary), "stages": stages, **described}


def _described(features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """timm's `feature_info` in `StagedBackbone`'s words."""
    return {
        "channels": [feature["num_chs"] for feature in features],
        "strides": [feature["reduction"] for feature in features],
    }


def _quarter(network: nn.Module) -> tuple[list[nn.Module], dict[str, Any]]:
    """Four equal groups of the blocks of a network with one resolution, and what describes it.

    Takes them out of the network, which stays as the stem, and removes what serves classification alone.
    """
    blocks, norm = network.blocks, network.norm
    network.blocks, network.norm, network.fc_norm, network.head = (nn.Identity() for _ in range(4))
    network.attn_pool = None
    bounds = [round(len(blocks) * k / 4) for k in range(5)]
    return [blocks[start:end] for start, end in itertools.pairwise(bounds)], {
        "channels": [network.embed_dim] * 4,
        "strides": [network.patch_embed.patch_size[0]] * 4,
        "layout": "NLC",
        "prefix_tokens": network.num_prefix_tokens,
        "output_norm": norm,
    }


def _call_fused_projections(network: nn.Module) -> None:
    """Where queries and values have biases and keys none, timm reads the projection's weight and goes past the module
    itself; a method that replaces the module (LoRA) would train in vain. This makes timm call it."""
    for module in network.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True


def load_into(network: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Load a checkpoint's tensors into a timm network without classifier; the checkpoint's classifier is left out.

    Raises `UserError` that counts and names the tensors that are missing, not known, of another shape, or no numbers.
    What batch norms have counted may be missing: older checkpoints lack it, and nothing here reads it.
    """
    classifier = network.pretrained_cfg.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(tuple(f"{c}." for c in classifiers))}
    wanted = network.state_dict()
    problems = _name_some("missing", [n for n in wanted if n not in tensors and not n.endswith(".num_batches_tracked")])
    problems += _name_some("not of this network", [name for name in tensors if name not in wanted])
    problems += _name_some(
        "of another shape",
        [
            f"{name} {list(tensors[name].shape)} for {list(wanted[name].shape)}"
            for name in wanted
            if name in tensors and tensors[name].shape != wanted[name].shape
        ],
    )
    problems += _name_some(
        "not finite floating-point numbers",
        [
            name
            for name in wanted
            if name in tensors and wanted[name].is_floating_point() and not _is_finite(tensors[name])
        ],
    )
    if problems:
        architecture = network.pretrained_cfg.get("architecture", "the backbone")
        raise UserError(f"{origin}: does not fit {architecture}: {'; '.join(problems)}")
    with torch.no_grad():
        network.load_state_dict({name: tensors.get(name, own).to(own.dtype) for name, own in wanted.items()})


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def _name_some(what: str, names: Sequence[str], limit: int = 3) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{what}: {', '.join(names[:limit])}{more}"]
