"""The loop: budget in, trained tensors out. One screen, in the order in which it happens."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from harness.engine.batches import Batch, BatchSource
from harness.engine.evaluation import confusion
from harness.method import Hyperparameters
from harness.models.losses import labels_at
from harness.models.network import Segmenter, apply_memory_format
from harness.runs.checkpoints import Checkpoints
from harness.runs.metrics import metrics
from harness.spec import Budget
from harness.util.seeds import derive

CURVE_POINTS = 100
"""How many points a training curve has at most."""


class Diverged(Exception):
    """The loss is not finite any more."""

    def __init__(self, step: int):
        super().__init__(f"the loss was not finite at step {step}")
        self.step = step


class Interrupted(Exception):
    """Asked to stop; a checkpoint was written."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass
class Meters:
    """What is summed up while training. Part of the checkpoint, so that a resumed run reports what a whole one does."""

    images: int = 0
    seconds: float = 0.0
    """What the training takes when it shares nothing: what was reused counts with the time it took when computed."""
    data_seconds: float = 0.0
    spent: float = 0.0
    """What it took here: of what was shared with others, its part."""
    reused: float = 0.0
    """Steps whose prefix was not computed but kept from an earlier run."""
    loss_sum: float = 0.0
    loss_steps: int = 0
    matrix: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))


@dataclass(frozen=True)
class CurvePoint:
    """One point of the training curve. `loss` and `miou_train` are of the training crops since the point before."""

    step: int
    loss: float
    lr: float
    miou_train: float | None
    images_per_second: float


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into a flag that the loop looks at; a second one acts at once.

    What comes within a second is the same wish: `torchrun` passes on what its processes were sent already.
    """

    def __enter__(self) -> StopSignals:
        self.raised = False
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if not self.raised:
            self.raised, self._at = True, time.monotonic()
        elif time.monotonic() - self._at > 1:
            raise KeyboardInterrupt


def parameter_groups(network: Segmenter, hyperparameters: Hyperparameters) -> list[dict[str, Any]]:
    """AdamW's groups: the head apart for its learning rate, biases and norms apart for their lack of weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.trained_parameters():
        groups.setdefault((name.startswith("head."), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "base_lr": hyperparameters.lr * (hyperparameters.head_lr_scale if in_head else 1),
            "weight_decay": hyperparameters.weight_decay if decayed else 0.0,
        }
        for (in_head, decayed), parameters in groups.items()
    ]


class TrainCallbacks:
    """Told how a network's training goes."""

    def on_resume(self, step: int) -> None: ...

    def on_step(self, step: int, loss: float, lr: float) -> None: ...

    def on_point(self, point: CurvePoint) -> None: ...

    def on_checkpoint(self, step: int) -> None: ...


class TrainState:
    """One network in training, with an optimiser, meters and checkpoints of its own."""

    def __init__(
        self,
        network: Segmenter,
        budget: Budget,
        hyperparameters: Hyperparameters,
        seed: int,
        fabric: Fabric,
        checkpoints: Checkpoints,
        *,
        frozen_stages: int = 0,
        checkpoint_seconds: float = 30,
        watcher: TrainCallbacks | None = None,
    ):
        """`frozen_stages`: stages of the backbone whose outputs it can be fed in place of images."""
        self.network, self.backbone, self.frozen_stages = network, network.backbone, frozen_stages
        self.budget, self.hyperparameters, self.seed = budget, hyperparameters, seed
        self.fabric, self.checkpoints = fabric, checkpoints
        self.watcher = watcher or TrainCallbacks()
        self.step = 0
        self.meters = Meters()
        self._checkpoint_seconds, self._saved = checkpoint_seconds, time.monotonic()

    @property
    def finished(self) -> bool:
        return self.step == self.budget.steps

    def begin(self) -> None:
        """On the device, from the last checkpoint if there is one."""
        network, fabric = self.network, self.fabric
        apply_memory_format(fabric.to_device(network), self.budget)
        optimizer = torch.optim.AdamW(
            parameter_groups(network, self.hyperparameters),
            lr=self.hyperparameters.lr,
            fused=self.budget.precision != "fp16",
        )
        if (found := self.checkpoints.latest()) is not None:
            self.step, state = found
            network.load_trained_state(state["trained"])
            optimizer.load_state_dict(state["optimizer"])
            fabric.strategy.precision.load_state_dict(state["precision"])
            self.meters = Meters(**state["meters"])
            self.watcher.on_resume(self.step)
        self._model, self._optimizer = fabric.setup(network, optimizer)
        self._model.train()
        self._saved = time.monotonic()

    def learn(self, passes: Sequence[Batch], beside: int) -> None:
        """One optimiser step on what its forward passes are fed, `beside` others that are fed the same."""
        budget, meters, fabric, step = self.budget, self.meters, self.fabric, self.step
        began = time.monotonic()
        torch.manual_seed(derive(self.seed, "step", step, fabric.global_rank))
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * budget.learning_rate_factor(step)
        loss_value = 0.0
        for part, given in enumerate(passes):
            with fabric.no_backward_sync(self._model, enabled=part < budget.accumulate - 1):
                loss, logits = self._model(given.behind(self.frozen_stages), given.masks)
                fabric.backward(loss / budget.accumulate)
            loss_value += loss.item() / budget.accumulate
            _count(meters, logits, given.masks)
        if not math.isfinite(loss_value):
            raise Diverged(step + 1)
        if budget.clip_norm:
            fabric.clip_gradients(self._model, self._optimizer, max_norm=budget.clip_norm, error_if_nonfinite=False)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

        own = time.monotonic() - began
        meters.images += budget.batch_size
        meters.loss_sum += loss_value
        meters.loss_steps += 1
        meters.data_seconds += sum(given.waited for given in passes)
        meters.seconds += own + sum(given.seconds(self.frozen_stages) for given in passes)
        meters.spent += own + sum(given.spent for given in passes) / (1 + beside)
        meters.reused += sum(given.reused for given in passes) / len(passes)
        self.step += 1
        lr = self.hyperparameters.lr * budget.learning_rate_factor(step)
        self.watcher.on_step(self.step, loss_value, lr)
        if self.step % math.ceil(budget.steps / CURVE_POINTS) == 0 or self.finished:
            self.watcher.on_point(_point(self.step, lr, meters))

    def save_if_due(self, stopping: bool) -> None:
        if stopping or self.finished or time.monotonic() - self._saved > self._checkpoint_seconds:
            asked = time.monotonic()
            self.save()
            self._saved = time.monotonic()
            self._checkpoint_seconds = max(self._checkpoint_seconds, 20 * (self._saved - asked))

    def save(self) -> None:
        if self.fabric.is_global_zero:
            state = {
                "trained": self.network.trained_state(),
                "optimizer": self._optimizer.optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "meters": vars(self.meters),
            }
            self.checkpoints.save(self.step, state)
        self.watcher.on_checkpoint(self.step)


def train(
    learners: Sequence[TrainState],
    feeder: BatchSource,
    on_failure: Callable[[TrainState, Exception], None] | None = None,
) -> None:
    """Train networks in place for the whole of their one budget, each from its last checkpoint on, side by side.

    Each ends as it would alone: the randomness of a step depends on the seed and the step alone, and so do its images.
    What goes wrong with one is given to `on_failure`, and the others go on; without it, it is raised (`Diverged`).
    Raises `Interrupted` after a signal, when checkpoints have been written.
    """
    learning = list(learners)

    @contextlib.contextmanager
    def guarded(learner: TrainState) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if on_failure is None:
                raise
            learning.remove(learner)
            on_failure(learner, error)

    for learner in learners:
        with guarded(learner):
            learner.begin()
    if all(learner.finished for learner in learning):
        return
    budget, fabric = learning[0].budget, learning[0].fabric
    with StopSignals() as stop, contextlib.closing(feeder):
        first = min(learner.step for learner in learning)
        fed = feeder.passes(first * budget.accumulate)
        for step in range(first, budget.steps):
            passes = [next(fed) for _ in range(budget.accumulate)]
            now = [learner for learner in learning if learner.step == step]
            for learner in now:
                with guarded(learner):
                    learner.learn(passes, len(now) - 1)
            stopping = stop.raised
            if fabric.world_size > 1:  # all leave after the same step, whenever each of them was told
                stopping = fabric.strategy.reduce_boolean_decision(stopping, all=False)
            for learner in now:
                if learner in learning:
                    with guarded(learner):
                        learner.save_if_due(stopping)
            if stopping and learning:
                raise Interrupted(step + 1)
            if all(learner.finished for learner in learning):
                return


def _count(meters: Meters, logits: Tensor, masks: Tensor) -> None:
    """Add the crops' predictions at the head's own resolution, which costs next to nothing."""
    classes = logits.shape[1]
    if meters.matrix.numel() == 0:
        meters.matrix = torch.zeros(classes, classes, dtype=torch.int64)
    meters.matrix = meters.matrix.to(logits.device)
    meters.matrix += confusion(logits.argmax(1), labels_at(masks, logits.shape[-2:]), classes)


def _point(step: int, lr: float, meters: Meters) -> CurvePoint:
    point = CurvePoint(
        step=step,
        loss=meters.loss_sum / meters.loss_steps,
        lr=lr,
        miou_train=metrics(meters.matrix.cpu().numpy()).miou,
        images_per_second=meters.images / meters.seconds,
    )
    meters.loss_sum, meters.loss_steps = 0.0, 0
    meters.matrix = torch.zeros_like(meters.matrix)
    return point
