"""A method that keeps the contract, and ones that each break it in one way."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from harness import method
from harness.contract.cases import CLASSES
from harness.method import Method, Unsupported, hyperparameter


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(x)


class Good(Method):
    """A zero-initialised 1×1 residual behind the first stage: what the broken ones below are made of."""

    name = "good"
    summary = "for tests"
    source = "this test"

    def attach(self, backbone, num_classes):
        backbone.insert_after_stage(0, Residual(backbone.channels[0]))

    def parameter_count(self, backbone, num_classes):
        return backbone.channels[0] * (backbone.channels[0] + 1)


class Unfrozen(Good):
    """Forgets to un-freeze what it means to train."""

    def attach(self, backbone, num_classes):
        super().attach(backbone, num_classes)
        backbone.gaps.requires_grad_(False)


class MovesStatistics(Good):
    """Lets a frozen batch norm follow the batch."""

    def attach(self, backbone, num_classes):
        super().attach(backbone, num_classes)
        norm = next(module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))
        norm.register_forward_pre_hook(lambda module, _: setattr(module, "training", backbone.training))


class WrongCount(Good):
    def parameter_count(self, backbone, num_classes):
        return backbone.channels[0] ** 2


class RightForOneNumberOfClasses(Good):
    def parameter_count(self, backbone, num_classes):
        return super().parameter_count(backbone, num_classes) + (num_classes - CLASSES)


class Shared(Good):
    """Keeps its module on the class."""

    kept: ClassVar[dict[int, nn.Module]] = {}

    def attach(self, backbone, num_classes):
        channels = backbone.channels[0]
        backbone.insert_after_stage(0, self.kept.setdefault(channels, Residual(channels)))


class Nothing(Good):
    def attach(self, backbone, num_classes):
        pass

    def parameter_count(self, backbone, num_classes):
        return 0


class HeadOnly(Nothing):
    head_only = True


class Crashes(Good):
    def attach(self, backbone, num_classes):
        raise KeyError("layer5")


class CrashesInTraining(Good):
    def auxiliary_loss(self, masks):
        raise RuntimeError("no maps")


class Random(Good):
    """Draws from a generator of its own."""

    def attach(self, backbone, num_classes):
        super().attach(backbone, num_classes)
        own = torch.Generator()
        own.seed()
        nn.init.normal_(backbone.gaps["0"].mix.weight, std=1e-9, generator=own)


class OtherStart(Good):
    def attach(self, backbone, num_classes):
        super().attach(backbone, num_classes)
        nn.init.constant_(backbone.gaps["0"].mix.bias, 1.0)


class OtherStartAndSaysSo(OtherStart):
    changes_start = "adds one to a map"


class NeverUsed(Good):
    """One of its parameters is in no graph."""

    def attach(self, backbone, num_classes):
        super().attach(backbone, num_classes)
        backbone.gaps["0"].spare = nn.Parameter(torch.ones(3))

    def parameter_count(self, backbone, num_classes):
        return super().parameter_count(backbone, num_classes) + 3


class Remembers(Good):
    """Adds up its maps over forward passes."""

    class Module(Residual):
        kept = 0.0

        def forward(self, x):
            self.kept = self.kept + self.mix(x).mean()
            return x + self.mix(x) + self.kept

    def attach(self, backbone, num_classes):
        backbone.insert_after_stage(0, self.Module(backbone.channels[0]))


class OutsideTheDelta(Good):
    """Trains a tensor that is not a parameter or a buffer."""

    class Module(Residual):
        steps = 0.0

        def forward(self, x):
            self.steps += 0.1 * self.training
            return x + self.mix(x) + self.steps

    def attach(self, backbone, num_classes):
        backbone.insert_after_stage(0, self.Module(backbone.channels[0]))


class CopiesTheBackbone(Good):
    def attach(self, backbone, num_classes):
        super().attach(backbone, num_classes)
        first = next(p for p in backbone.stages.parameters() if p.ndim > 1)
        backbone.gaps["0"].register_buffer("original", first.detach().clone())


class FullPrecisionOnly(Good):
    class Module(Residual):
        def forward(self, x):
            mixed = self.mix(x)
            if mixed.dtype != torch.float32:
                raise TypeError("expected float32")
            return x + mixed

    def attach(self, backbone, num_classes):
        backbone.insert_after_stage(0, self.Module(backbone.channels[0]))


class CountsOnContiguousMaps(Good):
    class Module(Residual):
        def forward(self, x):
            return super().forward(x) + 0 * x.view(len(x), -1).sum()

    def attach(self, backbone, num_classes):
        backbone.insert_after_stage(0, self.Module(backbone.channels[0]))


class Explodes(Good):
    class Hyperparameters(method.Hyperparameters):
        lr: float = hyperparameter(10.0, "learning rate", gt=0, le=10)

    def attach(self, backbone, num_classes):
        super().attach(backbone, num_classes)
        backbone.unfreeze(*backbone.stages.parameters())

    def parameter_count(self, backbone, num_classes):
        return super().parameter_count(backbone, num_classes) + sum(p.numel() for p in backbone.stages.parameters())


class NoWithoutReason(Good):
    def supports(self, backbone):
        return False


class ChangesWhatItIsAskedAbout(Good):
    def supports(self, backbone):
        backbone.unfreeze(backbone.stem)
        return True


class ConvolutionsOnly(Good):
    def supports(self, backbone):
        return True if backbone.hierarchical else Unsupported("for CNNs")
