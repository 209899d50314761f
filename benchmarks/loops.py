"""The harness's loop compared with a plain PyTorch loop and mmengine's Runner: same network, images and schedule.

The table verifies that they are equivalent: after the last step all three have the same trained tensors, bit-identical
on a CPU. To this end all three derive a step's dropout from the seed and the step, and mmengine's Runner, which
otherwise has its defaults, computes the schedule in closed form where `PolyLR` accumulates it. The time is from the
built network to the trained tensors on disk: it includes the start of the loader's processes and the saving at the end,
but not the construction of a Runner, which inspects the machine.
"""

from __future__ import annotations

import contextlib
import gc
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.measure import Ratio, Table, in_turn
from benchmarks.setting import Setting
from harness.cells.resolve import Cell
from harness.data.augmentation import TrainStream
from harness.engine.batches import BatchSource
from harness.engine.training import TrainState, parameter_groups, train
from harness.models.network import Segmenter, UnsupportedMethod
from harness.runs.checkpoints import Checkpoints
from harness.spec import Budget
from harness.util.quiet import quiet_imports
from harness.util.seeds import derive

with quiet_imports():
    import cv2
    from mmengine.model import BaseModel
    from mmengine.optim import OptimWrapper
    from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
    from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
    from mmengine.runner import Runner

METHODS = ("linear", "spm", "full")
"""From short steps, where the cost of the loop matters most, to long ones."""


def table(setting: Setting, backbones: Sequence[str], methods: Sequence[str]) -> Table:
    budget = setting.budget
    result = Table(
        "The loop: images per second",
        ["backbone", "method", "harness, images/s", "over a plain loop", "over mmengine's Runner", "trained tensors"],
        f"{budget.steps} steps of {budget.batch_size} images, {setting.workers} loader processes, in {setting.rounds} "
        "rounds; above 1 the harness is faster (aims: 0.98 and 1). *Trained tensors*: whether those of all three are "
        "the same after the last step.",
    )
    for backbone in backbones:
        for method in methods:
            cell = setting.cell(backbone, method)
            try:
                seconds, same = _compare(setting, cell)
            except UnsupportedMethod as reason:
                result.notes.append(str(reason))
                continue
            images = budget.steps * budget.batch_size
            rate = Ratio.of([images] * setting.rounds, seconds["harness"])
            against = (Ratio.of(seconds[other], seconds["harness"]) for other in ("plain", "mmengine"))
            result.add(backbone, method, f"{rate.middle:.1f}", *against, same)
    return result


def _compare(setting: Setting, cell: Cell) -> tuple[dict[str, list[float]], str]:
    """Seconds of each loop in each round, and the differences of their trained tensors."""
    loops = {"harness": _harness, "plain": _plain, "mmengine": _mmengine}
    trained: dict[str, dict[str, Tensor]] = {}

    def timed(name: str) -> Callable[[], float]:
        def run() -> float:
            network = setting.network(cell)
            stream = setting.stream(cell, network)
            gc.collect()  # frees the Runner
            with tempfile.TemporaryDirectory(dir=setting.scratch) as place:
                seconds = loops[name](setting, network, stream, Path(place))
            trained[name] = {key: tensor.detach().clone() for key, tensor in network.trained_state().items()}
            return seconds

        return run

    seconds = in_turn({name: timed(name) for name in loops}, setting.rounds, warm_up=1)
    return seconds, _agreement(trained)


def _agreement(trained: dict[str, dict[str, Tensor]]) -> str:
    """As text: equal to the bit, or which loop differs from the harness and by how much."""
    ours, different = trained["harness"], []
    for name in ("plain", "mmengine"):
        theirs = trained[name]
        assert theirs.keys() == ours.keys()
        if not all(torch.equal(ours[key], theirs[key]) for key in ours):
            most = max((ours[key].float() - theirs[key].float()).abs().max().item() for key in ours)
            different.append(f"{name} differs by up to {most:.1e}")
    return ", ".join(different) or "equal to the bit"


def _harness(setting: Setting, network: Segmenter, stream: TrainStream, place: Path) -> float:
    started = setting.clock()
    state = TrainState(network, setting.budget, network.method.hyperparameters, 0, setting.fabric, Checkpoints(place))
    train([state], BatchSource(stream, setting.budget, setting.fabric, setting.workers, [state]))
    return setting.clock() - started


def _plain(setting: Setting, network: Segmenter, stream: TrainStream, place: Path) -> float:
    """A minimal loop with the same training."""
    budget = setting.budget
    started = setting.clock()
    optimizer = torch.optim.AdamW(parameter_groups(network, network.method.hyperparameters), lr=1e-3, fused=True)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step, batch in enumerate(_loader(setting, stream)):
        torch.manual_seed(derive(0, "step", step, 0))
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * budget.learning_rate_factor(step)
        images, masks = setting.images(batch[0]), batch[1].to(setting.device, non_blocking=True)
        loss, _ = network(images, masks)
        loss.backward()
        if budget.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, budget.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.save(network.trained_state(), place / "trained.pt")
    return setting.clock() - started


def _mmengine(setting: Setting, network: Segmenter, stream: TrainStream, place: Path) -> float:
    budget = setting.budget
    groups = [
        {"params": group["params"], "lr": group["base_lr"], "weight_decay": group["weight_decay"]}
        for group in parameter_groups(network, network.method.hyperparameters)
    ]
    with _quiet():
        runner = Runner(
            model=_Model(network, setting),
            work_dir=str(place),
            train_dataloader=_loader(setting, stream),
            train_cfg={"type": "IterBasedTrainLoop", "max_iters": budget.steps},
            optim_wrapper=OptimWrapper(
                torch.optim.AdamW(groups, fused=True),
                clip_grad={"max_norm": budget.clip_norm} if budget.clip_norm else None,
            ),
            default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": budget.steps}},
            env_cfg={"mp_cfg": {"opencv_num_threads": cv2.getNumThreads()}},
            default_scope="mmseg",
            randomness={"seed": 0},
            experiment_name=place.name,
        )
        runner.param_schedulers = [_Schedule(runner.optim_wrapper.optimizer, budget)]
        started = setting.clock()
        runner.train()
        return setting.clock() - started


def _loader(setting: Setting, stream: TrainStream) -> DataLoader[tuple[Tensor, Tensor]]:
    """The same batches as in the harness, with as many workers."""
    return DataLoader(
        stream,
        batch_size=setting.budget.batch_size,
        num_workers=setting.workers,
        pin_memory=setting.device.type == "cuda",
        prefetch_factor=4 if setting.workers else None,
    )


class _Model(BaseModel):
    """The interface of a network for mmengine's Runner."""

    def __init__(self, network: nn.Module, setting: Setting):
        super().__init__()
        self.network = network
        self.images = setting.images
        self.step = 0

    def forward(self, images: Tensor, masks: Tensor, mode: str) -> dict[str, Tensor]:
        assert mode == "loss"
        torch.manual_seed(derive(0, "step", self.step, 0))
        self.step += 1
        loss, _ = self.network(self.images(images), masks)
        return {"loss": loss}


class _Schedule(LRSchedulerMixin, _ParamScheduler):
    """The budget's learning rates."""

    def __init__(self, optimizer: torch.optim.Optimizer, budget: Budget):
        self._budget = budget
        super().__init__(optimizer, by_epoch=False, end=budget.steps)

    def _get_value(self) -> list[float]:
        factor = self._budget.learning_rate_factor(self.last_step)
        return [base * factor for base in self.base_values]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A Runner that only logs to its file."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        yield
