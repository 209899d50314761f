"""Ladder side-tuning: a light network parallel to the frozen one reads it through gates; the backbone gets no gradient.

This file declares and attaches; the modules are in `methods/modules/side.py`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from harness import method
from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from harness.models.backbones.backbone import StagedBackbone


class Side(Method):
    """A side network of 1 / reduction of the backbone's width reads the detached activations of its blocks.

    From the paper (section 3) and its code (github.com/ylsung/Ladder-Side-Tuning): one side block per backbone block; a
    linear layer brings the backbone's activation h to the side's width; a learned gate mixes it with the side's own
    state s, μ s + (1 − μ) down(h), μ = sigmoid(α / 0.1), α zero at the start; norm and a linear layer back to full
    width at the end; reduction 8. The paper drops some ladders to save more: `every`.

    Departures from that code, which is for language transformers of one width (T5, BART, CLIP-ViL's encoder):

    - The side block is a ConvNeXt-like one (depth-wise 3×3, MLP), the same for every family, not a narrower copy of
      the backbone's block; so there are no weights pruned by Fisher information to start from, as in the released
      scripts (`fisher-v2`), and the side network starts at random.
    - The first ladder starts the state. The code starts it with a layer of its own on the token embeddings and has a
      gate at the first block too.
    - The side follows the backbone's pyramid, by average pooling and a 1×1 convolution between stages.
    - Each stage's map gets the side's state added, through a layer that starts at zero; in the code the head reads the
      side network alone, which does not start as the frozen network.
    - No dropout in the side network; no stage's side is narrower than eight channels.

    The scripts' learning rate is 3e-3, which is in the search range.
    """

    name = "side"
    summary = "a light gated network beside the backbone; no gradient through the backbone"
    source = "Sung et al., LST: Ladder Side-Tuning, arXiv 2206.06522"

    class Hyperparameters(method.Hyperparameters):
        reduction: int = hyperparameter(
            8, "the backbone's width over the side network's", ge=1, le=64, search=[2, 4, 8, 16]
        )
        every: int = hyperparameter(1, "a ladder at every n-th block of a stage, counted from its last", ge=1, le=64)
        expansion: int = hyperparameter(
            4, "width of a side block's MLP, as a multiple of its own", ge=1, le=8, search=[2, 4]
        )

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        steps = [after / before for before, after in itertools.pairwise(backbone.strides)]
        if any(step != int(step) for step in steps):
            return Unsupported(f"strides {backbone.strides} are not multiples of each other")
        return True

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.side import Activations, Ladder, Tap

        activations = Activations()
        rungs = self._rungs(backbone)
        for block in backbone.blocks:
            if any(block.index == index for stage in rungs for index, _ in stage):
                backbone.insert_after_block(block, Tap(block.index, activations), view="map")
        backbone.insert_at_output(
            Ladder(
                rungs=rungs,
                channels=backbone.channels,
                widths=self._widths(backbone),
                strides=backbone.strides,
                expansion=self.hyperparameters.expansion,
                activations=activations,
            )
        )

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        """See `ladder_parameters`."""
        from methods.modules.side import ladder_parameters

        rungs = [[channels for _, channels in stage] for stage in self._rungs(backbone)]
        return ladder_parameters(rungs, backbone.channels, self._widths(backbone), self.hyperparameters.expansion)

    def _widths(self, backbone: StagedBackbone) -> list[int]:
        """At least eight channels, or as many as the stage has: a norm over very few removes most of their content."""
        return [max(min(8, channels), channels // self.hyperparameters.reduction) for channels in backbone.channels]

    def _rungs(self, backbone: StagedBackbone) -> list[list[tuple[int, int]]]:
        """(index, channels) of the blocks with a ladder, by stage."""
        chosen = []
        for stage in range(len(backbone.stages)):
            blocks = [block for block in backbone.blocks if block.stage == stage]
            chosen.append([(b.index, b.channels) for b in blocks[:: -self.hyperparameters.every]][::-1])
        return chosen
