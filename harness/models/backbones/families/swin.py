"""Swin Transformer, versions 1 and 2: attention inside shifted windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from harness.models.backbones.family import (
    BranchPath,
    CutNetwork,
    Family,
    TinyNetwork,
    call_fused_projections,
    post_norm_branches,
    pre_norm_branches,
    rename,
)

_TINY = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


class Swin(Family):
    """Swin Transformer: Liu et al., arXiv 2103.14030.

    Every second block shifts its windows in all stages, also where the pre-training image was one window, as in
    mmsegmentation. The head trains a norm for each output, as there; the pre-trained one only fits the last stage.
    """

    modules = {"swin_transformer": TinyNetwork("swin_tiny_patch4_window7_224", _TINY)}
    options = {"strict_img_size": False, "always_partition": True}
    layer_roles = {"reduction": "merge"}

    def cut(self, network: Any) -> CutNetwork:
        stages, features = list(network.layers), network.feature_info
        return CutNetwork.described(network.patch_embed, stages, features, layout="NHWC", trains_output_norms=True)

    def from_openmmlab(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the authors' files. mmsegmentation merges patches by `nn.Unfold`, which orders channels differently."""
        return {
            name: _in_order_of_patches(tensor) if ".downsample." in name else tensor
            for name, tensor in rename(tensors, _OPENMMLAB).items()
        }

    def branches(self, block: Any) -> list[BranchPath]:
        return pre_norm_branches(attention="NHWC")


_OPENMMLAB: Mapping[str, str] = {
    r"^stages\.": "layers.",
    r"^patch_embed\.projection\.": "patch_embed.proj.",
    r"\.attn\.w_msa\.": ".attn.",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.",
}


def _in_order_of_patches(tensor: Tensor) -> Tensor:
    """[..., C * 4], the four patches of each channel in rows -> [..., 4 * C], by patches in columns."""
    channels = tensor.shape[-1] // 4
    patches = tensor.reshape(*tensor.shape[:-1], channels, 4).transpose(-1, -2)
    return patches[..., [0, 2, 1, 3], :].reshape(tensor.shape)


class SwinV2(Swin):
    """Swin Transformer V2: Liu et al., arXiv 2111.09883. Windows and shifts of every stage stay as pre-trained."""

    modules = {"swin_transformer_v2": TinyNetwork("swinv2_tiny_window8_256", _TINY)}
    options = {"strict_img_size": False}

    def from_openmmlab(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def cut(self, network: Any) -> CutNetwork:
        call_fused_projections(network)
        return super().cut(network)

    def branches(self, block: Any) -> list[BranchPath]:
        return post_norm_branches(attention="NHWC")
