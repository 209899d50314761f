"""Adapters: a small bottleneck after every residual branch, trained in an otherwise frozen network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from harness import method
from harness.method import Method, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.attach import Block, Branch
    from harness.models.backbones.backbone import StagedBackbone


class Adapter(Method):
    """Every branch's output f passes through f + up(act(down f)) before it is added to the residual stream.

    `houlsby` has one after attention and one after the MLP (paper, section 2.1), `pfeiffer` only one after the MLP
    (AdapterFusion, section 3, of which only the place is taken). Width, GELU, dropout and frozen norms are those of the
    vision code that is followed; Houlsby et al. train the norms too. They draw both projections close to zero; here the
    upper one is zero, so that training starts at the frozen network.

    Ours: blocks of ResNet, MobileNet and RegNet have no branches of two kinds and get one adapter after each block; a
    ConvNeXt block has a single branch and one adapter after it.
    """

    name = "adapter"
    summary = "a sequential bottleneck after attention and MLP"
    source = (
        "Houlsby et al., Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751; Pfeiffer et al., "
        "AdapterFusion, arXiv 2005.00247; code followed: the adapter baseline of github.com/Leiyi-Hu/mona"
    )

    class Hyperparameters(method.Hyperparameters):
        width: int = hyperparameter(64, "channels of the bottleneck", ge=1, le=4096, search=(8, 128, "log"))
        variant: Literal["houlsby", "pfeiffer"] = hyperparameter(
            "houlsby", "after every branch of a block, or only after its last one", search=["houlsby", "pfeiffer"]
        )
        activation: Literal["relu", "gelu"] = hyperparameter("gelu", "non-linearity of the bottleneck")
        dropout: float = hyperparameter(0.1, "dropout in the bottleneck", ge=0, le=0.9, search=(0.0, 0.2))
        scale: float = hyperparameter(1.0, "factor on what an adapter adds", gt=0, le=100, search=(0.1, 10, "log"))

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.bottleneck import Bottleneck

        options = self.hyperparameters.model_dump(include={"width", "activation", "dropout", "scale"})
        for branch in self._branches(backbone):
            backbone.insert_at_exit(branch, Bottleneck(branch.channels, residual=True, **options))
        for block in backbone.unbranched_blocks:
            backbone.insert_after_block(block, Bottleneck(block.channels, residual=True, **options))

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        from methods.modules.bottleneck import bottleneck_parameters

        places: list[Branch | Block] = [*self._branches(backbone), *backbone.unbranched_blocks]
        return sum(bottleneck_parameters(place.channels, self.hyperparameters.width) for place in places)

    def _branches(self, backbone: StagedBackbone) -> list[Branch]:
        if self.hyperparameters.variant == "houlsby":
            return backbone.branches
        return list({branch.block: branch for branch in backbone.branches}.values())
