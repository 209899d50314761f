"""A plugin: one method in one short file."""

from __future__ import annotations

SCALE = '''"""Learned per-channel scales behind the stages, from the documentation of harness.method alone."""

from harness import method
from harness.method import Method, No, knob


class Scale(Method):
    name = "channel_scale"
    summary = "one learned factor a channel behind each stage"
    source = "an example"

    class Hyperparameters(method.Hyperparameters):
        stages: int = knob(4, "how many of the last stages are scaled", ge=1, le=4, search=[1, 2, 3, 4])

    def supports(self, backbone):
        return True if len(backbone.stages) == 4 else No("has not four stages")

    def attach(self, backbone, num_classes):
        import torch
        from torch import nn

        class Factors(nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.factors = nn.Parameter(torch.ones(channels, 1, 1))

            def forward(self, feature_map):
                return feature_map * self.factors

        for stage in range(4 - self.hyperparameters.stages, 4):
            backbone.insert_after_stage(stage, Factors(backbone.channels[stage]))

    def parameter_count(self, backbone, num_classes):
        return sum(backbone.channels[-self.hyperparameters.stages :])
'''
