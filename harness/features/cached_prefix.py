"""The outputs of frozen stages, read from the feature cache where it has them and computed otherwise.

Used for training and for evaluation. A policy decides whether outputs are also written.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.features.policy import WritePolicy
from harness.features.store import CachedTensor, FeatureStream
from harness.models.backbones.backbone import StagedBackbone, StageOutputs
from harness.util.device_clock import clock


@dataclass(frozen=True)
class CachedPass:
    """One forward pass through the frozen stages."""

    outputs: StageOutputs
    seconds: tuple[float, ...]
    """Seconds that computing each stage took, here or where it was computed first. If the pass was not `timed`, on a
    GPU they are those to start it."""
    cached: int
    """Number of stages that were read from the cache."""
    inputs: Mapping[str, CachedTensor]
    """The tensors that were read with them: see `inputs` of `CachedPrefix`."""
    timed: bool = False
    """Whether the device is waited for after each stage that is computed."""


class CachedPrefix:
    """The outputs of a backbone's first `stages` stages, all frozen, for each of a run's forward passes.

    Passes are numbered from 0; pass i has the same images in every run that uses the stream.
    """

    def __init__(
        self,
        backbone: StagedBackbone,
        stages: int,
        device: torch.device,
        stream: FeatureStream | None = None,
        policy: WritePolicy | None = None,
        inputs: tuple[str, ...] = (),
        shared: bool = False,
    ):
        """`inputs`: names of other tensors that a pass needs, such as the labels; stored with its first stage.
        `shared`: several networks use the passes, and each needs the seconds of its own stages.

        Without a stream everything is computed; without a policy nothing is written. Only passes that are shared or
        written are timed stage by stage: on a GPU, waiting for each stage costs time.
        """
        self.backbone, self.stages, self.device = backbone, stages, device
        self._stream, self._policy, self._inputs, self._shared = stream, policy, inputs, shared

    @property
    def _writer(self) -> tuple[FeatureStream, WritePolicy] | None:
        """Where to write and what decides it, while anything is written."""
        stream, policy = self._stream, self._policy
        return (stream, policy) if stream is not None and policy is not None and policy.writes else None

    def has(self, index: int) -> bool:
        """Whether pass `index` can start from the cache, without its images."""
        return self._stream is not None and self._stream.has(index, self._names(1))

    def read(self, index: int, size: tuple[int, int]) -> CachedPass | None:
        """The longest cached prefix of a pass with images of `size` (H, W), on the device; None if there is none."""
        for stages in range(self.stages, 0, -1):
            names = self._names(stages)
            if self._stream is None or not self._stream.has(index, names):
                continue
            tensors = self._stream.read(index, names)
            if tensors is not None:
                outputs = [tensors[f"stage{stage}"] for stage in range(stages)]
                return CachedPass(
                    StageOutputs([output.tensor.to(self.device) for output in outputs], size),
                    tuple(output.seconds for output in outputs),
                    stages,
                    {name: tensors[name] for name in self._inputs},
                )
        return None

    def complete(
        self,
        index: int,
        start: Tensor | CachedPass,
        inputs: Mapping[str, tuple[Tensor, float]] | None = None,
    ) -> CachedPass:
        """Compute the missing stages, from images [B, 3, H, W] or from the cached stages, and offer them to the policy;
        with images, also `inputs`: by name the tensor and the seconds that making it took.
        """
        known = start if isinstance(start, CachedPass) else None
        outputs = start.outputs if isinstance(start, CachedPass) else start
        seconds = list(known.seconds) if known else []
        computed = dict(inputs or {})
        writer = self._writer
        timed = self._shared or writer is not None
        now = functools.partial(clock, self.device) if timed else time.perf_counter
        for stage in range(len(seconds), self.stages):
            started = now()
            outputs = self.backbone.prefix(outputs, stage + 1)
            seconds.append(now() - started)
            computed[f"stage{stage}"] = outputs.outputs[stage], seconds[stage]
        assert isinstance(outputs, StageOutputs)
        if computed and writer is not None:
            stream, policy = writer
            policy.write(stream, index, computed)
        return CachedPass(outputs, tuple(seconds), known.cached if known else 0, known.inputs if known else {}, timed)

    def finish(self) -> None:
        """Complete a stream whose number of passes was unknown: see `FeatureStream.finish`."""
        if self._writer is not None:
            self._writer[0].finish()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _names(self, stages: int) -> list[str]:
        return [*self._inputs, *(f"stage{stage}" for stage in range(stages))]


class EvaluationPrefix:
    """A `CachedPrefix` for the forward passes of one evaluation, called in order."""

    def __init__(self, prefix: CachedPrefix):
        self._prefix = prefix
        self._passes = self._cached = 0

    def __call__(self, images: Tensor) -> StageOutputs:
        known = self._prefix.read(self._passes, (images.shape[-2], images.shape[-1]))
        found = self._prefix.complete(self._passes, known or images)
        self._passes += 1
        self._cached += found.cached == self._prefix.stages
        return found.outputs

    @property
    def cached_share(self) -> float:
        """Share of the passes so far for which no stage was computed."""
        return self._cached / self._passes if self._passes else 0.0

    def close(self) -> None:
        """Called after the last pass."""
        self._prefix.finish()
        self._prefix.close()
