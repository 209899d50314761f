"""Conv-Adapter: adapters for convolutional networks, in parallel to the convolutions of every block.

This file declares and attaches; the modules and their places are in `methods/modules/conv_adapter.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from harness import method
from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.backbone import StagedBackbone
    from methods.modules.conv_adapter import Place


class ConvAdapter(Method):
    """f(x) becomes f(x) + α ⊙ point(act(depth x)), with f a part of a block and the compression γ = 8 of the released
    code. Places are that code's where it has the family:

    - bottleneck (ResNet, also RegNet, ResNeSt, SKNet): from the input of the K×K convolution to behind the norm and
      activation that follow it; basic block: beside its first convolution, before the norm.
    - inverted residual, edge residual and convolution blocks (EfficientNet, MobileNet): beside the whole block, from
      its input to its output, with the block's stride. None beside a depth-wise separable block.
    - ConvNeXt: beside the 7×7 convolution and beside the convolutions between stages.

    Ours, in families that the code does not have: Res2Net beside each of the 3×3 convolutions that share a bottleneck's
    channels, as no module holds them together; MetaFormer beside the mixer of separable convolutions, which is an
    inverted residual itself, and beside the convolutions between stages.

    Departures: the code draws the point-wise convolution; here it starts at zero, so that training starts at the frozen
    network. Beside an inverted residual the code gives the adapter the kernel of the block's expansion, which is 1×1
    in its networks, so that nothing there is depth-wise; here it is that of the block's K×K convolution, as in the
    paper. The code's activation is the network's own. Where γ does not divide the channels, the depth-wise part has
    fewer and larger groups.
    """

    name = "conv_adapter"
    summary = "depth-wise and point-wise adapters in parallel to a CNN's blocks"
    source = (
        "Chen et al., Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets, arXiv 2208.07463; "
        "code read: github.com/Hhhhhhao/Conv-Adapter"
    )

    class Hyperparameters(method.Hyperparameters):
        compression: int = hyperparameter(
            8, "input channels per channel of the adapter, γ", ge=1, le=256, search=[2, 4, 8, 16]
        )
        activation: Literal["relu", "gelu"] = hyperparameter("relu", "non-linearity between the two convolutions")

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        if self._places(backbone):
            return True
        return Unsupported("its blocks have no convolutions outside of attention and MLP")

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.conv_adapter import ConvAdapterModule

        options = self.hyperparameters.model_dump(include={"compression", "activation"})
        for place in self._places(backbone):
            backbone.add_to_layer(place.first, ConvAdapterModule(place, **options), through=place.last)

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        return sum(place.parameters(self.hyperparameters.compression) for place in self._places(backbone))

    @staticmethod
    def _places(backbone: StagedBackbone) -> list[Place]:
        from methods.modules.conv_adapter import find_places

        return find_places(backbone)
