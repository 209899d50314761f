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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment

from harness import cost, provenance
from harness.backbones.staged import StagedBackbone
from harness.backbones.weights import load_backbone, tensors_digest
from harness.cells import Cell
from harness.claims import ClaimLost
from harness.console import Reporter
from harness.datasets import split_samples
from harness.datasets.base import Pair, Sample, SegmentationDataset
from harness.datasets.transforms import TrainStream
from harness.delta import DeltaHeader, save_delta
from harness.errors import UserError
from harness.evaluation import Predictor, evaluate
from harness.files import is_disk_full
from harness.metrics import metrics, save_confusions
from harness.network import Segmenter, Unsupported, build_segmenter
from harness.pictures import save_picture, strip
from harness.plugins import method_origin
from harness.runs import RunFolder, RunStore, State
from harness.seeds import derive
from harness.spec import Precision
from harness.tracking import Mirror
from harness.training import Diverged, Interrupted, Meters, Point, train

SAMPLES = 4
"""How many evaluated images are kept as pictures."""


class RunFailed(Exception):
    """The run ended without a result; its folder says so too."""

    def __init__(self, state: State, reason: str, folder: Path):
        super().__init__(f"{state}: {reason}")
        self.state = state
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
) -> RunFolder:
    """Execute a cell, or go on with it, and return its finished run folder. A finished one is returned as it is.

    Raises `UserError` for what can be mended before anything is trained, with nothing left behind; `RunFailed` for a
    run that ended without a result; `Interrupted` when asked to stop.
    """
    run = store.folder(cell.spec)
    make_reproducible()
    fabric = make_fabric(device, cell.spec.budget.precision)
    reporter = Reporter(quiet, silent=not fabric.is_global_zero)
    with store.claim(run) if fabric.is_global_zero else contextlib.nullcontext() as run.claim:
        damaged = run.result_path.exists() and run.result() is None
        if damaged:
            reporter.line(f"{run.result_path} is damaged; the run is done again")
        afresh = again or damaged
        unfinished = afresh or run.result() is None
        fabric.barrier()  # every process has looked before the first one writes
        if unfinished:
            _Execution(
                cell=cell,
                store=store,
                run=run,
                afresh=afresh,
                fabric=fabric,
                reporter=reporter,
                mirror=mirror,
                workers=default_workers() if workers is None else workers,
                checkpoint_seconds=checkpoint_seconds,
            ).run_to_result()
            fabric.barrier()
    return run


def make_reproducible() -> None:
    """Ask torch for the same bits from the same seed. Kernels without a deterministic form warn in the log of torch."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


@dataclasses.dataclass
class _Execution:
    """One attempt at a cell by one process; the process of rank zero is the one that writes."""

    cell: Cell
    store: RunStore
    run: RunFolder
    afresh: bool
    """Set aside what is there, once the network stands, in place of going on from it."""
    fabric: Fabric
    reporter: Reporter
    mirror: Mirror
    workers: int
    checkpoint_seconds: float

    @property
    def writes(self) -> bool:
        return self.fabric.is_global_zero

    def run_to_result(self) -> None:
        """Build, train, evaluate, write. Until the network stands, nothing is written."""
        spec, dataset = self.cell.spec, self.cell.dataset
        fit, reported = split_samples(dataset, spec.part, spec.budget.dev_fraction)
        backbone = self._bare_backbone()
        bare_digest = tensors_digest(backbone)
        try:
            network = build_segmenter(backbone, self.cell.new_method(), spec.head, len(dataset.classes), spec.seed)
        except Unsupported as error:
            self._begin()
            self._record("unsupported", str(error))
            raise RunFailed("unsupported", str(error), self.run.path) from error
        stream = TrainStream(dataset, fit, spec.budget, derive(spec.seed, "data"), backbone.mean, backbone.std)
        flops = self._train_flops(network)

        with self._failures_recorded():
            self._begin()
            kind, colon, content = spec.weights.partition("sha256:")
            shown = f"weights sha256:{content[:12]}" if colon else f"weights {kind}"
            self.reporter.line(
                f"{spec.method} on {spec.backbone} ({shown}), {dataset.name}: {len(fit)} images to train on, "
                f"{len(reported)} to report on; head {spec.head}, budget {spec.budget.name}, seed {spec.seed}, "
                f"{provenance.device_name(self.fabric.device)}"
            )
            meters = self._train(network, stream)
            peak = cost.peak_memory_bytes(self.fabric.device)
            matrices = self._evaluate(network, reported)
            if not self.writes:
                return
            self.run.check_claim()
            header = DeltaHeader(
                spec=spec,
                classes=tuple(dataset.classes),
                palette=tuple(dataset.palette),
                scale=dataset.scale,
                backbone_sha256=bare_digest,
            )
            result = {
                "status": "done",
                "fingerprint": self.run.fingerprint,
                "spec": spec.model_dump(mode="json"),
                "metrics": _figures(dataset, matrices),
                "parameters": dataclasses.asdict(network.count_parameters()),
                "delta_bytes": save_delta(self.run.delta_path, network, header),
                "steps": spec.budget.steps,
                "images": meters.images,
                "train_seconds": meters.seconds,
                "images_per_second": meters.images / meters.seconds,
                "data_wait": meters.data_seconds / meters.seconds,
                "peak_memory_bytes": peak,
                "train_flops": flops,
                "inference": self._inference(network.backbone),
                "provenance": self._provenance(bare_digest, len(fit), len(reported)),
            }
            self.run.write_result(result)
            self.run.set_status("done", step=spec.budget.steps)
        self.run.checkpoints.clear()
        self.mirror.update(self.run.path, final=True)

    def _begin(self) -> None:
        if self.writes:
            if self.afresh:
                self.store.set_aside(self.run)
            self.run.begin(self.cell.spec, self.store.attempt(self.run))
            self.reporter.log_to(self.run.log_path)

    def _train_flops(self, network: Segmenter) -> int | None:
        """Also the rehearsal of a step, on shapes alone: a head that cannot be trained under the budget is refused.

        None where the step fails for another reason: if it is the network's, training meets it too, and records it.
        """
        budget = self.cell.spec.budget
        try:
            return cost.train_flops(network, budget)
        except Exception as error:
            if "more than 1 value per channel" not in str(error):
                return None
            raise UserError(
                f"--budget {budget.name}: the batch norms of head {self.cell.spec.head} see one value a channel in a "
                f"forward pass of {budget.batch_size // budget.accumulate}x3x{budget.crop[0]}x{budget.crop[1]}; "
                "give a larger `batch_size` or `crop`, or a smaller `accumulate`"
            ) from error

    def _bare_backbone(self) -> StagedBackbone:
        spec = self.cell.spec
        return load_backbone(spec.backbone, self.cell.weights, derive(spec.seed, "backbone"))

    def _train(self, network: Segmenter, stream: TrainStream) -> Meters:
        spec, budget = self.cell.spec, self.cell.spec.budget
        if self.fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.fabric.device)
        first, began = 0, time.monotonic()
        self.reporter.start("train", budget.steps)

        def on_resume(step: int) -> None:
            nonlocal first
            first = step
            self.reporter.line(f"going on from step {step}")
            self.reporter.start("train", budget.steps, step)

        def on_step(step: int, loss: float, lr: float) -> None:
            self.run.check_claim()
            images = (step - first) * budget.batch_size
            self.reporter.step(step, loss, lr, images / (time.monotonic() - began))

        def on_point(point: Point) -> None:
            self.reporter.point(point.step, point.loss, point.lr, point.miou_train, point.images_per_second)
            if self.writes:
                self.run.append_curve(dataclasses.asdict(point))

        def on_checkpoint(step: int) -> None:
            if self.writes:
                self.run.set_status("running", step=step)
                self.mirror.update(self.run.path)

        if self.writes:
            found = self.run.checkpoints.latest()
            for path in self.run.checkpoints.damaged():
                self.reporter.line(f"{path} is damaged and not gone on from")
            self.run.cut_curve(found[0] if found else 0)
        self.fabric.barrier()
        return train(
            network,
            stream,
            budget,
            network.method.hyperparameters,
            spec.seed,
            self.fabric,
            self.run.checkpoints,
            workers=self.workers,
            checkpoint_seconds=self.checkpoint_seconds,
            on_step=on_step,
            on_point=on_point,
            on_resume=on_resume,
            on_checkpoint=on_checkpoint,
        )

    def _evaluate(self, network: Segmenter, samples: list[Sample]) -> np.ndarray:
        """Confusion matrices [N, K, K] of all samples, in their order; each process evaluates its share."""
        backbone, dataset = network.backbone, self.cell.dataset
        predictor = Predictor(
            network, backbone.mean, backbone.std, dataset.scale, self.cell.spec.budget, self.fabric.device
        )
        kept = {round(i * (len(samples) - 1) / max(SAMPLES - 1, 1)) for i in range(SAMPLES)}
        self.reporter.start("evaluate", len(samples))

        def on_image(index: int, pair: Pair, prediction: np.ndarray) -> None:
            self.run.check_claim()
            self.reporter.advance(index + 1)
            if index in kept:
                name = samples[index].name.replace("/", "-") + ".png"
                save_picture(self.run.samples_path / name, strip(pair.image, pair.mask, prediction, dataset.palette))

        share = slice(self.fabric.global_rank, None, self.fabric.world_size)
        matrices = evaluate(predictor, dataset, samples, on_image, share)
        if self.fabric.world_size > 1:
            matrices = _gather(matrices, len(samples), self.fabric)
        if self.writes:
            self.run.check_claim()
            save_confusions(self.run.confusions_path, [sample.name for sample in samples], matrices)
        return matrices

    def _inference(self, adapted: StagedBackbone) -> dict[str, float]:
        bare = self.fabric.to_device(self._bare_backbone())
        seconds = cost.inference_seconds(adapted.eval(), bare, self.cell.spec.budget.crop, self.fabric.device)
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

    def _record(self, state: State, reason: str, **fields: Any) -> None:
        self.reporter.stop()
        if self.writes and self.run.path.exists():
            with contextlib.suppress(OSError):  # the disk may be what is full
                self.run.set_status(state, reason=reason, **fields)
                self.reporter.log(f"{state}: {reason}")
                self.mirror.update(self.run.path, final=True)

    @contextlib.contextmanager
    def _failures_recorded(self) -> Iterator[None]:
        """Turn every way a run can end early into a state and a reason in its folder."""
        try:
            yield
        except Interrupted as error:
            self._record("interrupted", f"stopped after step {error.step}", step=error.step)
            raise
        except KeyboardInterrupt:
            self._record("interrupted", "stopped")
            raise
        except Diverged as error:
            lr = self.cell.spec.hyperparameters["lr"]
            reason = (
                f"the loss was not finite at step {error.step}; try a smaller learning rate (--set lr=, now {lr:g})"
            )
            self._record("diverged", reason, step=error.step)
            raise RunFailed("diverged", reason, self.run.path) from error
        except ClaimLost:
            raise
        except UserError as error:
            self._record("failed", str(error))
            raise
        except Exception as error:
            self.run.check_claim()  # who took the run over cleared away what was being written
            if is_disk_full(error):
                reason = f"{self.run.path}: {error.strerror}; make room and repeat the command, it goes on"
                self._record("failed", reason)
                raise UserError(reason) from error
            if _is_out_of_memory(error):
                status = self.run.status()
                reason = (
                    f"out of memory after step {status.step if status else 0}; give a budget with a larger "
                    "`accumulate` or smaller crops, a lighter head, or a device with more memory"
                )
                self._record("out_of_memory", reason)
                raise RunFailed("out_of_memory", reason, self.run.path) from error
            with contextlib.suppress(OSError):
                self.reporter.log("".join(traceback.format_exception(error)))
            self._record("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
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
