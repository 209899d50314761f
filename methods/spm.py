"""SPM, the stage-wise Semantic-aware Prompt Matcher: light modules between the stages of a frozen backbone.

This file declares and attaches; the modules are in `methods/modules/spm.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from harness import method
from harness.method import Method, Unsupported, hyperparameter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.models.backbones.backbone import StagedBackbone

_OF_A_MATCHER = {"hidden", "iterations", "kernel", "share_weights", "guidance", "relative"}


class SPM(Method):
    """A matcher after each of the chosen stages turns the stage's map f into a better input for the next stage.

    From the paper (Liu et al., arXiv 2208.10159; its public text gives the idea and no more): the frozen backbone is
    cut into stages; a light module is between two stages; it refines its prompt recurrently; intermediate
    semantic maps guide it; it works for CNNs and Transformers. Its first version has no recurrence: `iterations=1`.

    Ours, each a hyperparameter or stated in `Matcher`: the width, the number of iterations and that they share
    weights, a depth-wise separable convolutional GRU as the recurrence, the working resolution, softmax of the
    semantic map as the form of guidance, cross-entropy as its supervision, prompts that scale and shift the map in
    units of its root mean square, and what a matcher passes on to the next: its last state, added to the next one's
    first, and its last semantic map, which the next one's maps correct.
    """

    name = "spm"
    summary = "recurrent, semantically guided prompts between the stages"
    source = "Liu et al., Prompt-Matched Semantic Segmentation, arXiv 2208.10159"

    class Hyperparameters(method.Hyperparameters):
        lr: float = hyperparameter(
            1e-3, "learning rate of all but the classifiers (AdamW)", gt=0, le=10, search=(1e-4, 3e-2, "log")
        )
        hidden: int = hyperparameter(32, "channels d of a matcher's state", ge=1, le=1024, search=(8, 64, "log"))
        iterations: int = hyperparameter(2, "refinements T of the prompt; 1: no recurrence", ge=1, le=16, search=(1, 5))
        kernel: int = hyperparameter(3, "side of the depth-wise convolutions, odd", ge=1, le=15, search=[3, 5, 7])
        working_stride: int = hyperparameter(
            16,
            "pixels of the image per cell of a matcher; finer maps are pooled to it",
            ge=1,
            le=256,
            search=[4, 8, 16, 32],
        )
        share_weights: bool = hyperparameter(True, "one recurrent cell for all iterations, not one each")
        guidance: bool = hyperparameter(True, "feed the semantic map back into the recurrence", search=[True, False])
        auxiliary: float = hyperparameter(
            0.4, "weight of the semantic maps' mean cross-entropy in each gap; 0: none", ge=0, le=10,
            search=(0.0, 1.0),
        )  # fmt: skip
        carry: bool = hyperparameter(
            True, "pass the last state and semantic map on to the next gap's matcher", search=[True, False]
        )
        relative: bool = hyperparameter(
            True, "divide the map by its RMS; prompts scale and shift it in units of its RMS, instead of a plain sum",
            search=[True, False],
        )  # fmt: skip
        gaps: str = hyperparameter("all", "gaps with a matcher, counted from 1 after the first stage, such as 1,3",
                         pattern=r"^(all|[1-9](,[1-9])*)$",
                         search=["all", "1", "2", "3", "1,2", "1,3", "2,3"])  # fmt: skip

        @field_validator("kernel")
        @classmethod
        def _odd(cls, kernel: int) -> int:
            if kernel % 2 == 0:
                raise ValueError("even; only odd kernels keep the size of a map")
            return kernel

        @field_validator("gaps")
        @classmethod
        def _ordered(cls, gaps: str) -> str:
            return gaps if gaps == "all" else ",".join(sorted(set(gaps.split(","))))

    def supports(self, backbone: StagedBackbone) -> bool | Unsupported:
        last = len(backbone.stages) - 1
        if self.hyperparameters.gaps != "all" and (missing := [g for g in self._gaps(backbone) if g >= last]):
            return Unsupported(f"gap {missing[0] + 1} does not exist: there are {last} gaps between {last + 1} stages")
        return True

    def attach(self, backbone: StagedBackbone, num_classes: int) -> None:
        from methods.modules.spm import Matcher, hand_on

        self._matchers = []
        for gap in self._gaps(backbone):
            pool = max(1, self.hyperparameters.working_stride // backbone.strides[gap])
            matcher = Matcher(pool=pool, **self._options(backbone.channels[gap], num_classes))
            backbone.insert_after_stage(gap, matcher)
            self._matchers.append(matcher)
        if self.hyperparameters.carry:
            hand_on(self._matchers)

    def parameter_count(self, backbone: StagedBackbone, num_classes: int) -> int:
        from methods.modules.spm import matcher_parameters

        gaps = self._gaps(backbone)
        return sum(matcher_parameters(**self._options(backbone.channels[gap], num_classes)) for gap in gaps)

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Those of the 1×1 convolutions that output the semantic maps."""
        classifiers = [matcher.semantic for matcher in self._matchers if matcher.semantic is not None]
        return [parameter for classifier in classifiers for parameter in classifier.parameters()]

    def auxiliary_loss(self, masks: Tensor) -> Tensor | None:
        """λ Σ over gaps of the mean over t = 0 .. T of the cross-entropy of m_t with the labels at its size.

        Takes the semantic maps of the last training forward pass; without one, None.
        """
        from methods.modules.spm import semantic_loss

        taken = [matcher.semantic_maps.take() for matcher in self._matchers]
        losses = [semantic_loss(semantic_maps, masks) for semantic_maps in taken if semantic_maps]
        return self.hyperparameters.auxiliary * sum(losses) if losses else None

    def _options(self, channels: int, num_classes: int) -> dict[str, Any]:
        """The arguments that `Matcher` and `matcher_parameters` share."""
        own = self.hyperparameters.model_dump(include=_OF_A_MATCHER)
        return {
            "channels": channels,
            "num_classes": num_classes,
            "supervised": self.hyperparameters.auxiliary > 0,
            **own,
        }

    def _gaps(self, backbone: StagedBackbone) -> list[int]:
        """0-based indices of the stages with a matcher after them. After the last stage there is no gap."""
        if self.hyperparameters.gaps == "all":
            return list(range(len(backbone.stages) - 1))
        return [int(gap) - 1 for gap in self.hyperparameters.gaps.split(",")]
