"""Conv-Adapter: adapters for convolutional networks, in parallel to the convolutions of every block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from harness import method
from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from torch import nn

    from harness.models.backbones.backbone import StagedBackbone


class ConvAdapter(Method):
    """conv(x) becomes conv(x) + α ⊙ point(act(depth x)) for every K×K convolution, K > 1, inside the blocks.

    The paper's "convolution parallel" scheme, with the compression γ = 8 that the released code has as its default.
    That code draws the point-wise convolution; here it starts at zero, so that training starts at the frozen network.
    It adds the result after the 3×3 convolution's norm and ReLU in bottleneck blocks, before the norm in basic ones,
    and after the block in EfficientNet; here it is added to the convolution's own output everywhere. Where γ does not
    divide the channels, the depth-wise part has fewer and larger groups.
    """

    name = "conv_adapter"
    summary = "depth-wise and point-wise adapters in parallel to a CNN's convolutions"
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
        if self._convolutions(backbone):
            return True
        return Unsupported("its blocks have no convolutions outside of attention and MLP")

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.conv_adapter import ConvAdapterModule

        options = self.hyperparameters.model_dump(include={"compression", "activation"})
        for name, convolution in self._convolutions(backbone).items():
            backbone.add_to_layer(name, ConvAdapterModule(convolution, **options))

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        from methods.modules.conv_adapter import conv_adapter_parameters

        compression = self.hyperparameters.compression
        return sum(conv_adapter_parameters(conv, compression) for conv in self._convolutions(backbone).values())

    @staticmethod
    def _convolutions(backbone: StagedBackbone) -> dict[str, nn.Conv2d]:
        """The K×K convolutions of blocks, except those inside attention and MLP."""
        layers: dict[str, Any] = {name: backbone.get_submodule(name) for name in backbone.layers("conv", "grouped")}
        return {
            name: layer
            for name, layer in layers.items()
            if max(layer.kernel_size) > 1 and not {"attn", "mlp", "downsample"} & set(name.split("."))
        }
