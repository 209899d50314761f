"""ResNet and the networks built like it, with other blocks or channel attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from harness.models.backbones.family import CutNetwork, Family, TinyNetwork, rename


class ResNet(Family):
    """ResNet, ResNeXt, Wide ResNet, ResNet-D, SE and ECA variants: He et al., arXiv 1512.03385, and successors; with
    other blocks Res2Net (1904.01169), ResNeSt (2004.08955) and SKNet (1903.06586)."""

    modules = {
        "resnet": TinyNetwork("test_resnet"),
        "res2net": TinyNetwork("res2net50_14w_8s", {"layers": (1, 1, 1, 1)}),
        "resnest": TinyNetwork("resnest14d"),
        "sknet": TinyNetwork("skresnet18", {"layers": (1, 1, 1, 1)}),
    }
    attention_gates = frozenset({"se", "fc1", "fc2", "fc_reduce", "fc_select"})

    def from_openmmlab(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The stem of three convolutions of ResNet-V1c and V1d: timm's `resnet50c`, `resnet50d`, ..."""
        return rename(tensors, {r"^stem\.7\.": "bn1.", r"^stem\.": "conv1."})

    def cut(self, network: Any) -> CutNetwork:
        return CutNetwork.described(
            nn.Sequential(network.conv1, network.bn1, network.act1, network.maxpool),
            [network.layer1, network.layer2, network.layer3, network.layer4],
            network.feature_info[-4:],
        )
