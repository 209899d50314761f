"""Small networks, and the layouts in which weights of such networks are published."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.models.backbones import families
from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.matching import Fit, find_fit, load
from harness.models.backbones.tensor_files import read_checkpoint

State = dict[str, Tensor]
RESNET = "resnet10t"
TINY: Mapping[str, dict[str, Any]] = {
    RESNET: {},
    "test_vit": {},
    "test_convnext": {},
    "vit_small_patch14_reg4_dinov2": {"embed_dim": 48, "depth": 4, "num_heads": 2},
    "deit3_small_patch16_224": {"embed_dim": 48, "depth": 4, "num_heads": 2},
    "eva02_tiny_patch14_224": {"depth": 4, "embed_dim": 48, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
}


def network(name: str, seed: int, **changes: Any) -> Any:
    """A small network with numbers that all differ, also where timm starts with zeros or ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = families.create(name, **TINY[name], **changes)
        with torch.no_grad():
            for tensor in made.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) * 0.1 + (0.5 if tensor.ndim == 1 else -0.05))
    return made


def saved(folder: Path, content: Any, name: str = "w.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def read_into(name: str, file: Path, **changes: Any) -> tuple[StagedBackbone, Fit]:
    """The backbone of a small network with other numbers, after the file was loaded into it."""
    into = network(name, 1, **changes)
    fit = find_fit(into, read_checkpoint(file).tensors, families.layouts(name), lambda: families.unused_tensors(name))
    load(into, fit, str(file))
    return families.cut(name, into), fit


def renamed(state: State, *rules: tuple[str, str]) -> State:
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    return state


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# Layouts: the state of a timm network -> what a file holds


def dino(state: State) -> Any:
    teacher = under("backbone.", state) | {"head.mlp.0.weight": torch.ones(2, 2)}
    student = under("module.backbone.", {name: tensor + 1 for name, tensor in state.items()})
    return {"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace(arch="vit_small")}


def mae(state: State) -> Any:
    more = {"mask_token": 1, "decoder_pos_embed": 1, "decoder_blocks.0.norm1.weight": 1, "decoder_pred.bias": 1}
    return {"model": state | dict.fromkeys(more, torch.ones(1, 1, 4)), "optimizer": {"state": {0: torch.ones(1)}}}


def dinov2_with_registers(state: State) -> Any:
    place = torch.full_like(state["cls_token"], 0.25)
    state = {name: tensor for name, tensor in state.items() if name not in ("reg_token", "pos_embed", "cls_token")} | {
        "cls_token": state["cls_token"] - place,
        "register_tokens": state["reg_token"],
        "pos_embed": torch.cat([place, state["pos_embed"]], dim=1),
    }
    return state | {"mask_token": torch.ones(1, 48)}


def deit3(state: State) -> Any:
    head = {"head.weight": torch.ones(1000, 48), "head.bias": torch.ones(1000)}
    return {"model": renamed(state, (r"ls([12])\.gamma", r"gamma_\1")) | head}


def eva02(state: State) -> Any:
    names = (r"mlp\.fc1\.", "mlp.w12."), (r"mlp\.fc2\.", "mlp.w3."), ("^fc_norm", "norm")
    return {"module": renamed(state, *names) | {"mask_token": torch.ones(1, 1, 48), "rope.freqs_cos": torch.ones(3)}}


def official_swin(state: State) -> Any:
    state = {
        re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name): tensor
        for name, tensor in state.items()
    }
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    return {"model": state | {"head.weight": torch.ones(1000, 192), "head.bias": torch.ones(1000)}}


OFFICIAL_CONVNEXT = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    ("conv_dw", "dwconv"),
    (r"mlp\.fc", "pwconv"),
    (r"mlp\.grn\.weight", "grn.gamma"),
    (r"mlp\.grn\.bias", "grn.beta"),
    (r"^head\.norm", "norm"),
)


def official_convnext(state: State) -> Any:
    return {
        "model": renamed(state, *OFFICIAL_CONVNEXT) | {"head.weight": torch.ones(9, 64), "head.bias": torch.ones(9)}
    }


def fcmae(state: State) -> Any:
    """Without the final norm, and with pointwise convolutions and GRN in the shapes of linear layers."""
    found = renamed(state, *OFFICIAL_CONVNEXT)
    found = {name: tensor for name, tensor in found.items() if not name.startswith("norm.")}
    return {"model": {
        name: tensor.flatten(1) if "pwconv" in name and tensor.ndim == 4
        else tensor.reshape(1, 1, 1, -1) if "grn" in name else tensor
        for name, tensor in found.items()
    } | {"decoder.0.dwconv.weight": torch.ones(2)}}  # fmt: skip


def official_pvt(state: State) -> Any:
    return {
        re.sub(
            r"^stages\.(\d)\.(downsample|blocks|norm)\.",
            lambda found: {"downsample": "patch_embed{}.", "blocks": "block{}.", "norm": "norm{}."}[found[2]].format(
                int(found[1]) + 1
            ),
            name,
        )
        .replace("patch_embed.", "patch_embed1.")
        .replace("mlp.dwconv", "mlp.dwconv.dwconv"): tensor
        for name, tensor in state.items()
    }


def segmentor(state: State) -> Any:
    decoder = {"decode_head.conv_seg.weight": torch.ones(19, 4, 1, 1), "auxiliary_head.conv_seg.bias": torch.ones(19)}
    return {"meta": {"iter": 1}, "state_dict": under("backbone.", state) | decoder}


def resnet_v1c(state: State) -> Any:
    return segmentor(renamed(state, (r"^conv1\.", "stem."), (r"^bn1\.", "stem.7.")))


def mmpretrain_convnext(state: State) -> Any:
    names = (("dwconv", "depthwise_conv"), ("pwconv", "pointwise_conv"), (r"^norm\.", "norm3."))
    return segmentor(renamed(state, *OFFICIAL_CONVNEXT, *names))


def mmpretrain_vit(state: State) -> Any:
    names = (
        (r"^blocks\.", "layers."),
        (r"patch_embed\.proj", "patch_embed.projection"),
        (r"^norm\.", "ln1."),
        (r"\.norm([12])\.", r".ln\1."),
        (r"ls1\.gamma", "attn.gamma1.weight"),
        (r"ls2\.gamma", "ffn.gamma2.weight"),
        (r"mlp\.fc1", "ffn.layers.0.0"),
        (r"mlp\.fc2", "ffn.layers.1"),
    )
    return {"state_dict": under("backbone.", renamed(state, *names)) | {"head.fc.weight": torch.ones(9, 9)}}


LAYOUTS: dict[str, tuple[str, Callable[[State], Any]]] = {
    "DINO": ("test_vit", dino),
    "DINOv2": ("test_vit", lambda state: state | {"mask_token": torch.ones(1, 64)}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", dinov2_with_registers),
    "MAE": ("test_vit", mae),
    "DeiT-3": ("deit3_small_patch16_224", deit3),
    "EVA-02": ("eva02_tiny_patch14_224", eva02),
    "Swin": ("swin_tiny_patch4_window7_224", official_swin),
    "ConvNeXt": ("test_convnext", official_convnext),
    "ConvNeXt V2, pre-trained only": ("convnextv2_atto", fcmae),
    "PVTv2": ("pvt_v2_b0", official_pvt),
    "mmsegmentation, ResNet-V1c": (RESNET, resnet_v1c),
    "mmpretrain, ConvNeXt": ("test_convnext", mmpretrain_convnext),
    "mmpretrain, ViT": ("deit3_small_patch16_224", mmpretrain_vit),
    "DistributedDataParallel, compiled": (RESNET, lambda state: under("module._orig_mod.", state)),
    "contrastive learning": (RESNET, lambda state: under("module.encoder_q.", state) | {"module.queue": torch.ones(3)}),
    "half precision, another prefix": (
        "test_vit",
        lambda s: under("image_encoder.", {n: t.half() for n, t in s.items()}),
    ),
}
