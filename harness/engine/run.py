"""One cell from claim to result: builds the network, trains it, evaluates it once, and writes the run folder.

What a failure means is decided here: a state and a reason in the run folder, one line for the user.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment

from harness.cells.plugins import method_origin
from harness.cells.resolve import Cell
from harness.data.augmentation import TrainStream
from harness.data.base import Pair, SegmentationDataset
from harness.data.splits import split_samples
from harness.engine import cost
from harness.engine.batches import BatchSource
from harness.engine.evaluation import Predictor, evaluate
from harness.engine.training import CurvePoint, Diverged, Interrupted, TrainCallbacks, TrainState, train
from harness.errors import UserError
from harness.features.cached_prefix import CachedPrefix
from harness.features.keys import FeatureCache
from harness.features.policy import FeatureCachePolicy
from harness.features.pretrained import PretrainedBackbone
from harness.launch.job import Outcome
from harness.method import Hyperparameters
from harness.models.backbones.backbone import StagedBackbone
from harness.models.backbones.weights import load_backbone
from harness.models.delta import DeltaHeader, save_delta
from harness.models.network import Segmenter, UnsupportedMethod, apply_memory_format, build_segmenter
from harness.runs.folder import RunFolder
from harness.runs.locks import AlreadyLocked, LockLost
from harness.runs.metrics import metrics, save_confusions
from harness.runs.result import RunResult
from harness.runs.samples import save_picture, strip
from harness.runs.state import Outcome as RunOutcome
from harness.runs.state import RunState
from harness.runs.store import RunStore
from harness.spec import Precision, SharedDataKey
from harness.tracking.mirror import Mirror
from harness.util import provenance
from harness.util.files import digest, is_disk_full
from harness.util.json_cache import cached_json
from harness.util.progress import Reporter
from harness.util.seeds import derive
from harness.util.sizes import CACHE_SIZE, parse_size

DEFAULT_CACHE = parse_size(CACHE_SIZE, "--cache-size")
SAMPLES = 4
"""How many evaluated images are kept as pictures."""


class RunFailed(Exception):
    """The run ended without a result; its folder says so too."""

    def __init__(self, outcome: RunOutcome, folder: Path):
        super().__init__(str(outcome))
        self.outcome = outcome
        self.folder = folder


def make_fabric(device: str, precision: Precision) -> Fabric:
    """Device placement, mixed precision and, under a `torchrun`-style launch, processes that share a batch.

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`. Raises `UserError` for another or for one that is absent.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
        raise UserError(f"--device {device}: give auto, cpu, cuda or cuda:N")
    kind, _, index = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA device here; give cpu, or see `harness doctor`")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fabric = Fabric(
        accelerator=kind,
        devices=[int(index)] if index and processes == 1 else processes,
        num_nodes=max(1, int(os.environ.get("WORLD_SIZE", "1")) // processes),
        strategy="ddp" if "LOCAL_WORLD_SIZE" in os.environ else "auto",
        # Without torchrun this process is the whole launch, also inside a job of Slurm's.
        plugins=[] if "LOCAL_WORLD_SIZE" in os.environ else [LightningEnvironment()],
        precision={"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[precision],
    )
    fabric.launch()
    return fabric


def default_workers() -> int:
    """Loader processes beside this one: none where they would take the only core from the network."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available // 2)


def execute(
    cell: Cell,
    store: RunStore,
    mirror: Mirror,
    *,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
    again: bool = False,
    checkpoint_seconds: float = 30,
    cache_bytes: int = DEFAULT_CACHE,
    more: int = 0,
) -> RunFolder:
    """Execute a cell, or go on with it, and return its finished run folder. A finished one is returned as it is.

    `cache_bytes` bounds what frozen features may take on disk (0: none are kept or used); `more` is how many further
    runs are expected that see the same training images. Neither changes a figure.

    Raises `UserError` for what can be mended before anything is trained, with nothing left behind; `RunFailed` for a
    run that ended without a result; `Interrupted` when asked to stop.
    """
    make_reproducible()
    fabric = make_fabric(device, cell.spec.budget.precision)
    execution = _Execution(cell, store, fabric, mirror, quiet, again, checkpoint_seconds, cache_bytes)
    with execution.claimed():
        if execution.unfinished():
            execution.prepare(execution.load_bare(keep=False))
            with execution.failures_recorded():
                execution.begin()
                train([execution.learner], _feeder([execution], workers, more))
                execution.finish()
            fabric.barrier()
    return execution.run


def execute_together(
    cells: Sequence[Cell],
    store: RunStore,
    mirror: Mirror,
    *,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
    checkpoint_seconds: float = 30,
    cache_bytes: int = DEFAULT_CACHE,
    more: int = 0,
) -> list[tuple[Outcome, str | None]]:
    """Execute cells side by side: one pass over the data and the frozen prefix, each with its own tensors and result.

    The cells differ in method, hyperparameters and head alone (`ValueError`). Each ends as it would have alone; what
    goes wrong with one is its outcome and reason, as its run folder says, and the others go on. Outcomes are in the
    order of the cells.
    """
    if len({SharedDataKey.of(cell.spec) for cell in cells}) > 1:
        raise ValueError("cells that are executed together see the same images through the same backbone")
    make_reproducible()
    outcomes: dict[int, tuple[Outcome, str | None]] = {}
    ready: list[_Execution] = []
    at: dict[int, int] = {}
    bare: PretrainedBackbone | None = None

    def dropped(execution: _Execution, error: BaseException) -> None:
        outcomes[at[id(execution)]] = outcome_of(error)
        if not isinstance(error, (AlreadyLocked, LockLost, Interrupted, KeyboardInterrupt, RunFailed, UserError)):
            traceback.print_exception(error)  # a bug, of the method or of ours
        if execution in ready:
            ready.remove(execution)

    with contextlib.ExitStack() as locks:
        for index, cell in enumerate(cells):
            fabric = make_fabric(device, cell.spec.budget.precision)  # one each: a loss scaler is part of a run
            execution = _Execution(
                cell, store, fabric, mirror, quiet, False, checkpoint_seconds, cache_bytes, alone=False
            )
            at[id(execution)] = index
            try:
                locks.enter_context(execution.claimed())
                if not execution.unfinished():
                    outcomes[index] = ("done", None)
                    continue
                bare = bare or execution.load_bare(keep=True)
                execution.prepare(bare)
                with execution.failures_recorded():
                    execution.begin()
            except Exception as error:
                dropped(execution, error)
            else:
                ready.append(execution)
        if ready:
            _train_together(ready, workers, more, dropped)
        for execution in list(ready):
            try:
                with execution.failures_recorded():
                    execution.finish()
                outcomes[at[id(execution)]] = ("done", None)
            except (Exception, KeyboardInterrupt) as error:
                dropped(execution, error)
    return [outcomes[index] for index in range(len(cells))]


def _train_together(ready: list[_Execution], workers: int | None, more: int, dropped: Any) -> None:
    """Train all that are ready; those that fail are dropped, all where they are asked to stop."""
    by_learner = {id(execution.learner): execution for execution in ready}

    def failed(learner: TrainState, error: Exception) -> None:
        execution = by_learner[id(learner)]
        try:
            with execution.failures_recorded():
                raise error
        except Exception as told:
            dropped(execution, told)

    try:
        train([execution.learner for execution in ready], _feeder(ready, workers, more), failed)
    except (Exception, KeyboardInterrupt) as error:
        for execution in list(ready):
            try:
                with execution.failures_recorded():
                    raise error
            except (Exception, KeyboardInterrupt) as told:
                dropped(execution, told)


def outcome_of(error: BaseException) -> tuple[Outcome, str | None]:
    """How a cell ended whose execution raised, and why, in one line."""
    match error:
        case AlreadyLocked():
            return "claimed", error.lock_owner
        case LockLost():
            return "claimed", str(error)
        case Interrupted() | KeyboardInterrupt():
            return "interrupted", str(error) or None
        case RunFailed():
            return error.outcome.state, error.outcome.reason
        case UserError():
            return "failed", str(error)
    return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _feeder(executions: Sequence[_Execution], workers: int | None, more: int) -> BatchSource:
    """What feeds the learners of executions that see the same images."""
    first = max(executions, key=lambda execution: execution.frozen_stages)
    budget = first.cell.spec.budget
    kept = first.reuse.training() if first.reuse.limit and first.frozen_stages else None
    keeping = None
    if kept is not None:
        passes = budget.steps * budget.accumulate
        keeping = FeatureCachePolicy(kept, first.reuse.limit, more, passes, first.reporter.line)
    return BatchSource(
        stream=first.stream,
        budget=budget,
        fabric=first.fabric,
        workers=default_workers() if workers is None else workers,
        fed=[execution.learner for execution in executions],
        kept=kept,
        keeping=keeping,
    )


def make_reproducible() -> None:
    """Ask torch for the same bits from the same seed. Kernels without a deterministic form warn in the log of torch."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


class _Execution(TrainCallbacks):
    """One attempt at a cell by one process; the process of rank zero is the one that writes."""

    def __init__(
        self,
        cell: Cell,
        store: RunStore,
        fabric: Fabric,
        mirror: Mirror,
        quiet: bool,
        again: bool,
        checkpoint_seconds: float,
        cache_bytes: int,
        alone: bool = True,
    ):
        self.cell, self.store, self.fabric, self.mirror = cell, store, fabric, mirror
        self.run = RunFolder(store.folder(cell.spec).path, mirror.update)
        self.reporter = Reporter(quiet, silent=not fabric.is_global_zero)
        self._again, self._checkpoint_seconds, self._cache_bytes = again, checkpoint_seconds, cache_bytes
        self._alone = alone
        """Whether nothing else is trained in this process meanwhile."""
        self._first_step = 0

    @property
    def writes(self) -> bool:
        return self.fabric.is_global_zero

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Raises `AlreadyLocked` where another process executes the run."""
        with self.store.lock(self.run) if self.writes else contextlib.nullcontext() as self.run.lock:
            yield

    def unfinished(self) -> bool:
        """Whether there is anything to do; a damaged result is as none."""
        damaged = self.run.result_path.exists() and self.run.result() is None
        if damaged:
            self.reporter.line(f"{self.run.result_path} is damaged; the run is done again")
        self._afresh = self._again or damaged
        unfinished = self._afresh or self.run.result() is None
        self.fabric.barrier()  # every process has looked before the first one writes
        return unfinished

    def load_bare(self, keep: bool) -> PretrainedBackbone:
        """The frozen backbone, which several cells can build on; see `PretrainedBackbone`."""
        spec, weights = self.cell.spec, self.cell.weights
        return PretrainedBackbone(lambda: load_backbone(spec.backbone, weights, derive(spec.seed, "backbone")), keep)

    def prepare(self, bare: PretrainedBackbone) -> None:
        """Build the network. Until it stands, nothing is written."""
        spec, dataset, backbone = self.cell.spec, self.cell.dataset, bare.backbone()
        self._bare = bare
        self._fit, self._reported = split_samples(dataset, spec.part, spec.budget.dev_fraction)
        try:
            network = build_segmenter(backbone, self.cell.new_method(), spec.head, len(dataset.classes), spec.seed)
        except UnsupportedMethod as error:
            self._begin_folder()
            raise self._record(RunState.UNSUPPORTED, str(error)) from error
        self.network = network
        self.frozen_stages = bare.count_frozen_stages(network.backbone)
        self.stream = TrainStream(
            dataset, self._fit, spec.budget, derive(spec.seed, "data"), backbone.mean, backbone.std
        )
        self._step = self._step_cost(network)
        self.reuse = FeatureCache(self.cell, self.store, bare.sha256, self.fabric, self._cache_bytes)

    def begin(self) -> None:
        """Open the run folder; from here on the run is a visible row."""
        spec, budget = self.cell.spec, self.cell.spec.budget
        self._begin_folder()
        kind, colon, content = spec.weights.partition("sha256:")
        shown = f"weights sha256:{content[:12]}" if colon else f"weights {kind}"
        self.reporter.line(
            f"{spec.method} on {spec.backbone} ({shown}), {self.cell.dataset.name}: {len(self._fit)} images to train "
            f"on, {len(self._reported)} to report on; head {spec.head}, budget {budget.name}, seed {spec.seed}, "
            f"{provenance.device_name(self.fabric.device)}"
        )
        if self.fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.fabric.device)
        self.reporter.start("train", budget.steps)
        if self.writes:
            found = self.run.checkpoints.latest()
            for path in self.run.checkpoints.damaged():
                self.reporter.line(f"{path} is damaged and not gone on from")
            self.run.cut_curve(found[0] if found else 0)
        self.fabric.barrier()
        self._began = time.monotonic()
        self.learner = TrainState(
            self.network,
            budget,
            self.network.method.hyperparameters,
            spec.seed,
            self.fabric,
            self.run.checkpoints,
            frozen_stages=self.frozen_stages,
            checkpoint_seconds=self._checkpoint_seconds,
            watcher=self,
        )

    def on_resume(self, step: int) -> None:
        self._first_step = step
        self.reporter.line(f"going on from step {step}")
        self.reporter.start("train", self.cell.spec.budget.steps, step)

    def on_step(self, step: int, loss: float, lr: float) -> None:
        self.run.check_lock()
        images = (step - self._first_step) * self.cell.spec.budget.batch_size
        self.reporter.step(step, loss, lr, images / (time.monotonic() - self._began))

    def on_point(self, point: CurvePoint) -> None:
        self.reporter.point(point.step, point.loss, point.lr, point.miou_train, point.images_per_second)
        if self.writes:
            self.run.append_curve(dataclasses.asdict(point))

    def on_checkpoint(self, step: int) -> None:
        if self.writes:
            self.run.progress(step)

    def finish(self) -> None:
        """Evaluate once, and write what came out."""
        spec, dataset, network, meters = self.cell.spec, self.cell.dataset, self.network, self.learner.meters
        peak = self._peak_memory()
        matrices, remembered = self._evaluate()
        if not self.writes:
            return
        self.run.check_lock()
        header = DeltaHeader(
            spec=spec,
            classes=tuple(dataset.classes),
            palette=tuple(dataset.palette),
            scale=dataset.scale,
            backbone_sha256=self._bare.sha256,
        )
        result = RunResult.model_validate(
            {
                "fingerprint": self.run.fingerprint,
                "spec": spec,
                "metrics": _figures(dataset, matrices),
                "parameters": dataclasses.asdict(network.count_parameters()),
                "delta_bytes": save_delta(self.run.delta_path, network, header),
                "steps": spec.budget.steps,
                "images": meters.images,
                "train_seconds": meters.seconds,
                "images_per_second": meters.images / meters.seconds,
                "data_wait": meters.data_seconds / meters.seconds,
                "peak_memory_bytes": peak,
                "train_flops": self._step and self._step.flops * spec.budget.steps,
                "inference": self._inference(network.backbone),
                "reuse": {
                    "frozen_stages": self.frozen_stages,
                    "training": meters.reused / spec.budget.steps,
                    "evaluation": remembered.reused / remembered.passes if remembered and remembered.passes else 0.0,
                    "spent_seconds": meters.spent,
                },
                "provenance": self._provenance(self._bare.sha256, len(self._fit), len(self._reported)),
            }
        )
        self.run.finish(RunOutcome(RunState.DONE, step=spec.budget.steps), result)
        self.run.checkpoints.clear()

    def _begin_folder(self) -> None:
        if self.writes:
            if self._afresh:
                self.store.archive(self.run)
            self.run.begin(self.cell.spec, self.store.attempt(self.run))
            self.reporter.log_to(self.run.log_path)

    def _peak_memory(self) -> int | None:
        """Bytes: as its allocator measured on a GPU; on a CPU, which keeps no such account, as a step's shapes say.

        None where it would not be the method's own: measured beside other cells or with a part of the work reused, or
        said of float32 where the step takes another precision.
        """
        device = self.fabric.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) if self._alone and not self.learner.meters.reused else None
        return self._step.peak_bytes if self._step and self.cell.spec.budget.precision == "fp32" else None

    def _step_cost(self, network: Segmenter) -> cost.StepCost | None:
        """Also the rehearsal of a step, on shapes alone: a head that cannot be trained under the budget is refused.

        None where the step fails for another reason: if it is the network's, training meets it too, and records it.
        """
        budget = self.cell.spec.budget
        try:
            step = cached_json(
                self.store.cache,
                "step",
                self._arithmetic(),
                lambda: dataclasses.asdict(cost.step_cost(network, budget)),
            )
            return cost.StepCost(**step)
        except Exception as error:
            if "more than 1 value per channel" not in str(error):
                return None
            raise UserError(
                f"--budget {budget.name}: the batch norms of head {self.cell.spec.head} see one value a channel in a "
                f"forward pass of {budget.batch_size // budget.accumulate}x3x{budget.crop[0]}x{budget.crop[1]}; "
                "give a larger `batch_size` or `crop`, or a smaller `accumulate`"
            ) from error

    def _evaluate(self) -> tuple[np.ndarray, CachedPrefix | None]:
        """Confusion matrices [N, K, K] of all samples, in their order; each process evaluates its share."""
        network, samples = self.network, self._reported
        backbone, dataset, budget = network.backbone, self.cell.dataset, self.cell.spec.budget
        remembered = None
        if self.frozen_stages and self.reuse.limit:
            stream = self.reuse.evaluation()
            remembered = CachedPrefix(backbone, self.frozen_stages, stream, self.reuse.limit, self.fabric.device)
        predictor = Predictor(
            network, backbone.mean, backbone.std, dataset.scale, budget, self.fabric.device, remembered
        )
        kept = {round(i * (len(samples) - 1) / max(SAMPLES - 1, 1)) for i in range(SAMPLES)}
        self.reporter.start("evaluate", len(samples))

        def on_image(index: int, pair: Pair, prediction: np.ndarray) -> None:
            self.run.check_lock()
            self.reporter.advance(index + 1)
            if index in kept:
                name = samples[index].name.replace("/", "-") + ".png"
                save_picture(self.run.samples_path / name, strip(pair.image, pair.mask, prediction, dataset.palette))

        share = slice(self.fabric.global_rank, None, self.fabric.world_size)
        matrices = evaluate(predictor, dataset, samples, on_image, share)
        if remembered is not None:
            remembered.finish()
        if self.fabric.world_size > 1:
            matrices = _gather(matrices, len(samples), self.fabric)
        if self.writes:
            self.run.check_lock()
            save_confusions(self.run.confusions_path, [sample.name for sample in samples], matrices)
        return matrices, remembered

    def _arithmetic(self) -> dict[str, Any]:
        """All that the arithmetic of a step hangs on; learning rates and weight decay are none of it."""
        spec = self.cell.spec
        own = {name: value for name, value in spec.hyperparameters.items() if name not in Hyperparameters.model_fields}
        return {
            "code": provenance.sources("harness", "methods"),
            "packages": provenance.packages(),
            "method": [spec.method, spec.method_code, own],
            "network": [spec.backbone, spec.head, len(self.cell.dataset.classes)],
            "budget": spec.budget.model_dump(mode="json", include={"steps", "batch_size", "accumulate", "crop"}),
        }

    def _inference(self, adapted: StagedBackbone) -> dict[str, float]:
        """Of a group's cells that differ in their learning rates alone, the first is timed for all."""
        key = digest(self._arithmetic())
        if key not in self._bare.timed:
            bare = apply_memory_format(self.fabric.to_device(self._bare.backbone()), self.cell.spec.budget)
            crop, device = self.cell.spec.budget.crop, self.fabric.device
            self._bare.timed[key] = cost.inference_seconds(adapted.eval(), bare, crop, device)
        seconds = self._bare.timed[key]
        return {"adapted_seconds": seconds[0], "backbone_seconds": seconds[1], "ratio": seconds[0] / seconds[1]}

    def _provenance(self, backbone_sha256: str, trained_on: int, reported_on: int) -> dict[str, Any]:
        spec, weights = self.cell.spec, self.cell.weights
        return {
            **provenance.code(),
            "packages": provenance.packages(),
            "method": method_origin(self.cell.method),
            "device": provenance.device_name(self.fabric.device),
            "processes": self.fabric.world_size,
            "threads": torch.get_num_threads(),
            "seed": spec.seed,
            "weights": {"identity": spec.weights, "given": weights.origin, "tensors_sha256": backbone_sha256},
            "data": {
                "name": spec.dataset,
                "sha256": spec.data_digest,
                "images_to_train_on": trained_on,
                "images_to_report_on": reported_on,
            },
        }

    def _record(self, state: RunState, reason: str, step: int | None = None) -> RunFailed:
        """Write how the run ended; what is returned can be raised."""
        self.reporter.stop()
        outcome = RunOutcome(state, reason, step)
        if self.writes and self.run.path.exists():
            with contextlib.suppress(OSError):  # the disk may be what is full
                self.reporter.log(str(outcome))
                self.run.finish(outcome)
        return RunFailed(outcome, self.run.path)

    @contextlib.contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Turn every way a run can end early into a state and a reason in its folder."""
        try:
            yield
        except Interrupted as error:
            self._record(RunState.INTERRUPTED, f"stopped after step {error.step}", step=error.step)
            raise
        except KeyboardInterrupt:
            self._record(RunState.INTERRUPTED, "stopped")
            raise
        except Diverged as error:
            lr = self.cell.spec.hyperparameters["lr"]
            reason = (
                f"the loss was not finite at step {error.step}; try a smaller learning rate (--set lr=, now {lr:g})"
            )
            raise self._record(RunState.DIVERGED, reason, step=error.step) from error
        except LockLost:
            raise
        except UserError as error:
            self._record(RunState.FAILED, str(error))
            raise
        except Exception as error:
            self.run.check_lock()  # who took the run over cleared away what was being written
            if is_disk_full(error):
                reason = f"{self.run.path}: {error.strerror}; make room and repeat the command, it goes on"
                self._record(RunState.FAILED, reason)
                raise UserError(reason) from error
            if _is_out_of_memory(error):
                status = self.run.status()
                reason = (
                    f"out of memory after step {status.step if status else 0}; give a budget with a larger "
                    "`accumulate` or smaller crops, a lighter head, or a device with more memory"
                )
                raise self._record(RunState.OUT_OF_MEMORY, reason) from error
            with contextlib.suppress(OSError):
                self.reporter.log("".join(traceback.format_exception(error)))
            self._record(RunState.FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            raise
        finally:
            self.reporter.stop()


def _gather(matrices: np.ndarray, total: int, fabric: Fabric) -> np.ndarray:
    """Each process's matrices of samples rank, rank + world, ... -> those of all samples in order."""
    each = -(-total // fabric.world_size)
    padded = torch.zeros(each, *matrices.shape[1:], dtype=torch.int64, device=fabric.device)
    padded[: len(matrices)] = torch.from_numpy(matrices)
    gathered = fabric.all_gather(padded)
    assert isinstance(gathered, torch.Tensor)
    return gathered.transpose(0, 1).reshape(-1, *matrices.shape[1:])[:total].cpu().numpy()


def _figures(dataset: SegmentationDataset, matrices: np.ndarray) -> dict[str, Any]:
    figures = metrics(matrices.sum(0))
    per_class = [
        {"name": name, "iou": iou, "acc": acc, "dice": dice}
        for name, iou, acc, dice in zip(dataset.classes, figures.iou, figures.acc, figures.dice, strict=True)
    ]
    overall = {key: getattr(figures, key) for key in ("miou", "macc", "aacc", "mdice")}
    return {**overall, "absent_classes": figures.absent, "per_class": per_class}


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises its own kind on a GPU and a plain RuntimeError from the CPU's allocator or for a loader's numpy."""
    said = ("can't allocate memory", "Caught MemoryError in DataLoader worker")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in said)
