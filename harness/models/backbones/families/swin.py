"""Swin Transformer, versions 1 and 2: attention inside shifted windows."""

from __future__ import annotations

from typing import Any

from harness.models.backbones.family import (
    BranchPath,
    CutNetwork,
    Family,
    TinyNetwork,
    call_fused_projections,
    post_norm_branches,
    pre_norm_branches,
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

    def branches(self, block: Any) -> list[BranchPath]:
        return pre_norm_branches(attention="NHWC")


class SwinV2(Swin):
    """Swin Transformer V2: Liu et al., arXiv 2111.09883. Windows and shifts of every stage stay as pre-trained."""

    modules = {"swin_transformer_v2": TinyNetwork("swinv2_tiny_window8_256", _TINY)}
    options = {"strict_img_size": False}

    def cut(self, network: Any) -> CutNetwork:
        call_fused_projections(network)
        return super().cut(network)

    def branches(self, block: Any) -> list[BranchPath]:
        return post_norm_branches(attention="NHWC")
