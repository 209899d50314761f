"""The training loop: budget in, trained tensors out, in the order in which it happens."""

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
from torch.nn.modules.conv import _ConvNd

from harness.engine.batches import Batch, BatchSource
from harness.engine.device import compiled
from harness.engine.evaluation import confusion, most_likely
from harness.engine.repeatable import strict_mode
from harness.method import HeadHyperparameters
from harness.models.losses import labels_at
from harness.models.network import Segmenter, apply_memory_format
from harness.runs.checkpoints import Checkpoints
from harness.runs.metrics import metrics
from harness.runs.state import Outcome, RunEnded, RunState
from harness.spec import Budget
from harness.util.seeds import derive

CURVE_POINTS = 100
"""How many points a training curve has at most."""
COUNTED_STEPS = 4
"""How many steps before a point of the curve have their crops scored."""
UNREAD_STEPS = 20
"""On a GPU, how many steps are queued at most before their losses are read, which waits for the device."""


@dataclass
class Meters:
    """Totals over the training. Part of the checkpoint, so that a resumed run reports the same totals."""

    images: int = 0
    seconds: float = 0.0
    """Training time as if nothing were shared: cached outputs count with the time that computing them took."""
    data_seconds: float = 0.0
    spent: float = 0.0
    """Actual training time, including a share of the time that was spent for several networks."""
    reused: float = 0.0
    """Steps whose prefix was read from the cache."""
    loss_sum: float = 0.0
    loss_steps: int = 0
    matrix: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))


@dataclass(frozen=True)
class CurvePoint:
    """One point of the training curve. `loss` is the mean since the previous point; `miou_train` that of the crops of
    the last `COUNTED_STEPS`, or of all since the previous point if they are fewer."""

    step: int
    loss: float
    lr: float
    miou_train: float | None
    images_per_second: float


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into a flag that the loop checks; a second one interrupts at once.

    Signals within one second count as one: `torchrun` forwards signals that its processes have already received.
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


def parameter_groups(network: Segmenter, hyperparameters: HeadHyperparameters) -> list[dict[str, Any]]:
    """AdamW's groups: heads and classifiers learn at `head_lr`, all else at `lr`.

    Weight decay applies to the weights of linear and convolutional layers and to what the method names: not to biases,
    norms, scales, gains, magnitudes, tokens, prompts or position tables, whose zero is not their neutral value.
    """
    of_heads = {id(parameter) for parameter in network.head_parameters()}
    decayed = {id(layer.weight) for layer in network.modules() if isinstance(layer, nn.Linear | _ConvNd)}
    named = set(network.method.decayed)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.trained_parameters():
        is_decayed = id(parameter) in decayed or not named.isdisjoint(name.split("."))
        groups.setdefault((id(parameter) in of_heads, is_decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "base_lr": hyperparameters.head_lr if in_head else hyperparameters.main_lr,
            "weight_decay": hyperparameters.weight_decay if is_decayed else 0.0,
        }
        for (in_head, is_decayed), parameters in groups.items()
    ]


class TrainCallbacks:
    """Called during the training of a network."""

    def on_start(self, step: int) -> None:
        """Called before the first step; `step` steps are in the checkpoint already."""

    def on_step(self, step: int, loss: float, lr: float) -> None:
        """`loss`: of the last step whose loss has been read."""

    def on_point(self, point: CurvePoint) -> None: ...

    def on_checkpoint(self, step: int) -> None: ...


class TrainState:
    """One network in training, with an optimiser, meters and checkpoints of its own."""

    def __init__(
        self,
        network: Segmenter,
        budget: Budget,
        hyperparameters: HeadHyperparameters,
        seed: int,
        fabric: Fabric,
        checkpoints: Checkpoints,
        *,
        frozen_stages: int = 0,
        strict: bool = False,
        checkpoint_seconds: float = 30,
        callbacks: TrainCallbacks | None = None,
    ):
        """`frozen_stages`: number of first stages whose outputs the network accepts instead of images. `strict`: steps
        are in `strict_mode` on a GPU."""
        self.network, self.backbone, self.frozen_stages = network, network.backbone, frozen_stages
        self.budget, self.hyperparameters, self.seed = budget, hyperparameters, seed
        self.fabric, self.checkpoints = fabric, checkpoints
        self.callbacks = callbacks or TrainCallbacks()
        self._mode = strict_mode if strict and fabric.device.type == "cuda" else contextlib.nullcontext
        self.step = 0
        self.meters = Meters()
        self._unread: list[Tensor] = []
        self._loss = math.nan
        self._checkpoint_seconds, self._saved = checkpoint_seconds, time.monotonic()

    @property
    def finished(self) -> bool:
        return self.step == self.budget.steps

    def begin(self) -> None:
        """Move to the device, and load the last checkpoint if there is one."""
        network, fabric = self.network, self.fabric
        apply_memory_format(fabric.to_device(network), self.budget)
        optimizer = torch.optim.AdamW(
            parameter_groups(network, self.hyperparameters),
            lr=self.hyperparameters.main_lr,
            fused=self.budget.precision != "fp16",
        )
        found = self.checkpoints.latest() if fabric.is_global_zero else None
        fabric.barrier()  # `latest` has moved damaged files aside
        if not fabric.is_global_zero:
            found = self.checkpoints.latest()
        if found is not None:
            self.step, state = found
            network.load_trained_state(state["trained"])
            optimizer.load_state_dict(state["optimizer"])
            fabric.strategy.precision.load_state_dict(state["precision"])
            self.meters = Meters(**state["meters"])
        self.callbacks.on_start(self.step)
        self._model, self._optimizer = fabric.setup(compiled(network) if self.budget.compile else network, optimizer)
        self._model.train()
        self._saved = time.monotonic()

    def learn(self, batches: Sequence[Batch], sharers: int = 1) -> None:
        """One optimiser step, with one forward pass per batch. `sharers`: number of networks on the same batches.

        Raises `RunEnded` if a loss is not finite: on a GPU up to `UNREAD_STEPS` later, with the step where it was.
        """
        budget, meters, fabric, step = self.budget, self.meters, self.fabric, self.step
        started = time.monotonic()
        torch.manual_seed(derive(self.seed, "step", step, fabric.global_rank))
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * budget.learning_rate_factor(step)
        interval = math.ceil(budget.steps / CURVE_POINTS)
        to_point = min(-(step + 1) % interval, budget.steps - step - 1)
        mean_loss = torch.zeros((), dtype=torch.float64, device=fabric.device)
        for part, batch in enumerate(batches):
            with self._mode(), fabric.no_backward_sync(self._model, enabled=part < budget.accumulate - 1):
                loss, logits = self._model(batch.behind(self.frozen_stages), batch.masks)
                fabric.backward(loss / budget.accumulate)
            mean_loss += loss.detach().double() / budget.accumulate
            if to_point < COUNTED_STEPS:
                _count(meters, logits, self.network.canvas_labels(batch.masks))
        if budget.clip_norm:
            fabric.clip_gradients(self._model, self._optimizer, max_norm=budget.clip_norm, error_if_nonfinite=False)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._unread.append(mean_loss)
        # To time frozen stages the batch source waits for the device: a step still queued then would not be counted.
        timed = any(batch.timed for batch in batches)
        is_due = to_point == 0 or math.isnan(self._loss) or len(self._unread) == UNREAD_STEPS
        if self._reads_at_once or timed or is_due:
            self._read_losses()

        own = time.monotonic() - started
        meters.images += budget.batch_size
        meters.data_seconds += sum(batch.waited for batch in batches)
        meters.seconds += own + sum(batch.seconds(self.frozen_stages) for batch in batches)
        meters.spent += own + sum(batch.spent for batch in batches) / sharers
        meters.reused += sum(batch.cached for batch in batches) / len(batches)
        lr = self.hyperparameters.main_lr * budget.learning_rate_factor(step)
        self.callbacks.on_step(self.step, self._loss, lr)
        if to_point == 0:
            self.callbacks.on_point(_point(self.step, lr, meters))

    @property
    def _reads_at_once(self) -> bool:
        return self.fabric.device.type == "cpu"

    def _read_losses(self) -> None:
        """Raises `RunEnded` for the first that is not finite."""
        if not self._unread:
            return
        losses, self._unread = torch.stack(self._unread).tolist(), []
        for step, loss in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss):
                rates = self.hyperparameters.model_dump(include={"lr", "head_lr"})
                now = " and ".join(f"{name}={rate:g}" for name, rate in sorted(rates.items(), reverse=True))
                reason = f"the loss was not finite at step {step}; try smaller learning rates (now {now})"
                raise RunEnded(Outcome(RunState.DIVERGED, reason, step))
            self._loss = loss
            self.meters.loss_sum += loss
            self.meters.loss_steps += 1

    def save_if_due(self, stopping: bool) -> None:
        if stopping or self.finished or time.monotonic() - self._saved > self._checkpoint_seconds:
            started = time.monotonic()
            self.save()
            self._saved = time.monotonic()
            self._checkpoint_seconds = max(self._checkpoint_seconds, 20 * (self._saved - started))

    def save(self) -> None:
        self._read_losses()
        if self.fabric.is_global_zero:
            state = {
                "trained": self.network.trained_state(),
                "optimizer": self._optimizer.optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "meters": vars(self.meters),
            }
            self.checkpoints.save(self.step, state)
        self.callbacks.on_checkpoint(self.step)


def train(
    states: Sequence[TrainState],
    source: BatchSource,
    on_failure: Callable[[TrainState, Exception], None] | None = None,
) -> None:
    """Train networks in place for their whole common budget, side by side, each from its last checkpoint.

    Results are the same as if each were trained alone: randomness and images of a step only depend on the seed and the
    step. If one raises an exception, `on_failure` is called and the others continue; without `on_failure` it is raised.
    After a signal, writes checkpoints and raises `RunEnded` with the state interrupted.
    """
    training = list(states)

    @contextlib.contextmanager
    def guarded(state: TrainState) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if on_failure is None:
                raise
            training.remove(state)
            on_failure(state, error)

    for state in states:
        with guarded(state):
            state.begin()
    if all(state.finished for state in training):
        return
    budget, fabric = training[0].budget, training[0].fabric
    with StopSignals() as stop, contextlib.closing(source):
        first = min(state.step for state in training)
        passes = source.passes(first * budget.accumulate)
        for step in range(first, budget.steps):
            batches = [next(passes) for _ in range(budget.accumulate)]
            current = [state for state in training if state.step == step]
            for state in current:
                with guarded(state):
                    state.learn(batches, len(current))
            stopping = stop.raised
            if fabric.world_size > 1:  # all processes stop after the same step, whichever received the signal first
                stopping = fabric.strategy.reduce_boolean_decision(stopping, all=False)
            for state in current:
                if state in training:
                    with guarded(state):
                        state.save_if_due(stopping)
            if stopping and training:
                raise interrupted(step + 1)
            if all(state.finished for state in training):
                return


def interrupted(step: int) -> RunEnded:
    """The exception for a run that was stopped and has a checkpoint of `step`."""
    return RunEnded(Outcome(RunState.INTERRUPTED, f"stopped after step {step}", step))


def _count(meters: Meters, logits: Tensor, masks: Tensor) -> None:
    """Count the crops' predictions at the head's own resolution, which is cheap; the masks are the canvas's."""
    classes = logits.shape[1]
    if meters.matrix.numel() == 0:
        meters.matrix = torch.zeros(classes, classes, dtype=torch.int64)
    meters.matrix = meters.matrix.to(logits.device)
    meters.matrix += confusion(most_likely(logits), labels_at(masks, (logits.shape[-2], logits.shape[-1])), classes)


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
