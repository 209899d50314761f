"""EfficientNet and MobileNet: timm's networks of inverted residual blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.models.backbones.family import CutNetwork, Family, TinyNetwork


class EfficientNet(Family):
    """EfficientNet (lite included), MobileNetV2, V3 and V4, and other networks of timm's `blocks`."""

    modules = {
        "efficientnet": TinyNetwork("test_efficientnet"),
        "mobilenetv3": TinyNetwork("mobilenetv3_small_050"),
    }
    layer_roles = {"query.proj": "q", "key.proj": "k", "value.proj": "v", "output.proj": "proj"}  # MobileNetV4
    attention_gates = frozenset({"se"})

    def cut(self, network: Any) -> CutNetwork:
        """A stage ends with the last block at its resolution; the block at stride 2 belongs to the first stage, the
        1×1 convolution that widens for the classifier to none, as in timm's own `features_only`."""
        features = [feature for feature in network.feature_info if feature["reduction"] >= 4]
        ends = [int(feature["module"].removeprefix("blocks.")) + 1 for feature in features]
        stages = [network.blocks[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return CutNetwork.described(nn.Sequential(network.conv_stem, network.bn1), stages, features)
