"""The loop: budget in, trained tensors out. One screen, in the order in which it happens."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness.datasets.transforms import TrainStream
from harness.errors import UserError
from harness.evaluation import confusion
from harness.losses import labels_at
from harness.method import Hyperparameters
from harness.metrics import metrics
from harness.network import Segmenter
from harness.runs import Checkpoints
from harness.seeds import derive
from harness.spec import Budget

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
    data_seconds: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    matrix: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))


@dataclass(frozen=True)
class Point:
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


def train(
    network: Segmenter,
    stream: TrainStream,
    budget: Budget,
    hyperparameters: Hyperparameters,
    seed: int,
    fabric: Fabric,
    checkpoints: Checkpoints,
    *,
    workers: int = 0,
    checkpoint_seconds: float = 30,
    on_step: Callable[[int, float, float], None] = lambda step, loss, lr: None,
    on_point: Callable[[Point], None] = lambda point: None,
    on_resume: Callable[[int], None] = lambda step: None,
    on_checkpoint: Callable[[int], None] = lambda step: None,
) -> Meters:
    """Train `network` in place for the whole budget, going on from the last checkpoint if there is one.

    The randomness of a step depends on the seed and the step alone, and so do its images: an interrupted run ends as
    an uninterrupted one. Raises `Diverged`, and `Interrupted` after a signal, when a checkpoint has been written.
    """
    fabric.to_device(network)
    optimizer = torch.optim.AdamW(
        parameter_groups(network, hyperparameters), lr=hyperparameters.lr, fused=budget.precision != "fp16"
    )
    meters, start = Meters(), 0
    if (found := checkpoints.latest()) is not None:
        start, state = found
        network.load_trained_state(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        fabric.strategy.precision.load_state_dict(state["precision"])
        meters = Meters(**state["meters"])
        on_resume(start)
    if start == budget.steps:
        return meters
    model, optimizer = fabric.setup(network, optimizer)
    model.train()

    def save(step: int) -> None:
        if fabric.is_global_zero:
            state = {
                "trained": network.trained_state(),
                "optimizer": optimizer.optimizer.state_dict(),
                "precision": fabric.strategy.precision.state_dict(),
                "meters": vars(meters),
            }
            checkpoints.save(step, state)
        on_checkpoint(step)

    every = math.ceil(budget.steps / CURVE_POINTS)
    saved = time.monotonic()
    with StopSignals() as stop:
        batches = iter(_batches(stream, budget, start, fabric, workers))
        for step in range(start, budget.steps):
            began = time.monotonic()
            torch.manual_seed(derive(seed, "step", step, fabric.global_rank))
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * budget.learning_rate_factor(step)
            loss_value = 0.0
            for part in range(budget.accumulate):
                asked = time.monotonic()
                batch = next(batches)
                meters.data_seconds += time.monotonic() - asked
                images, masks = fabric.to_device(batch)
                with fabric.no_backward_sync(model, enabled=part < budget.accumulate - 1):
                    loss, logits = model(images, masks)
                    fabric.backward(loss / budget.accumulate)
                loss_value += loss.item() / budget.accumulate
                _count(meters, logits, masks)
            if not math.isfinite(loss_value):
                raise Diverged(step + 1)
            if budget.clip_norm:
                fabric.clip_gradients(model, optimizer, max_norm=budget.clip_norm, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            meters.images += budget.batch_size
            meters.loss_sum += loss_value
            meters.loss_steps += 1
            meters.seconds += time.monotonic() - began
            lr = hyperparameters.lr * budget.learning_rate_factor(step)
            on_step(step + 1, loss_value, lr)
            if (step + 1) % every == 0 or step + 1 == budget.steps:
                on_point(_point(step + 1, lr, meters))
            due = time.monotonic() - saved > checkpoint_seconds
            stopping = stop.raised
            if fabric.world_size > 1:  # all leave after the same step, whenever each of them was told
                stopping = fabric.strategy.reduce_boolean_decision(stopping, all=False)
            if stopping or due or step + 1 == budget.steps:
                asked = time.monotonic()
                save(step + 1)
                saved = time.monotonic()
                checkpoint_seconds = max(checkpoint_seconds, 20 * (saved - asked))
            if stopping:
                raise Interrupted(step + 1)
    return meters


def _batches(
    stream: TrainStream, budget: Budget, start: int, fabric: Fabric, workers: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """This process's share of every forward pass from step `start` on; the shares of all processes are the batch."""
    size = budget.batch_size // budget.accumulate
    if size % fabric.world_size:
        raise UserError(
            f"{size} images a forward pass cannot be shared by {fabric.world_size} processes; "
            "start a number that divides them"
        )
    share = size // fabric.world_size
    first = range(start * budget.batch_size + fabric.global_rank * share, budget.steps * budget.batch_size, size)
    return DataLoader(
        stream,
        batch_sampler=[range(position, position + share) for position in first],
        num_workers=workers,
        worker_init_fn=_ignore_interrupts,
        pin_memory=fabric.device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the loop decides, and ends the workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _count(meters: Meters, logits: Tensor, masks: Tensor) -> None:
    """Add the crops' predictions at the head's own resolution, which costs next to nothing."""
    classes = logits.shape[1]
    if meters.matrix.numel() == 0:
        meters.matrix = torch.zeros(classes, classes, dtype=torch.int64)
    meters.matrix = meters.matrix.to(logits.device)
    meters.matrix += confusion(logits.argmax(1), labels_at(masks, logits.shape[-2:]), classes)


def _point(step: int, lr: float, meters: Meters) -> Point:
    point = Point(
        step=step,
        loss=meters.loss_sum / meters.loss_steps,
        lr=lr,
        miou_train=metrics(meters.matrix.cpu().numpy()).miou,
        images_per_second=meters.images / meters.seconds,
    )
    meters.loss_sum, meters.loss_steps = 0.0, 0
    meters.matrix = torch.zeros_like(meters.matrix)
    return point
