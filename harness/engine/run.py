"""One run, from its cell to its result: prepare, train, evaluate, write.

The lock and the run folder's states are in `attempt.py`, several runs in one process in `side_by_side.py`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch
from lightning_fabric import Fabric

from harness.cells.resolve import Cell
from harness.data.augmentation import TrainStream
from harness.data.base import Pair
from harness.data.fit import HELD_OUT, warnings
from harness.data.splits import drawn, split_samples
from harness.engine import cost, training
from harness.engine.attempt import RunAttempt
from harness.engine.batches import BatchSource
from harness.engine.device import check_compiler, default_workers, make_reproducible
from harness.engine.evaluation import Predictor, confusion_matrices
from harness.engine.options import ExecutionOptions
from harness.engine.phases import Evaluated, Prepared, Trained
from harness.engine.repeatable import kernel_that_does_not_repeat
from harness.engine.result import make_result
from harness.engine.training import CurvePoint, Meters, TrainCallbacks, TrainState
from harness.features.cached_prefix import CachedPrefix, EvaluationPrefix
from harness.features.keys import FeatureCache
from harness.features.policy import EvaluationCachePolicy, FeatureCachePolicy
from harness.features.pretrained import PretrainedBackbone
from harness.models.backbones.weights import load_backbone
from harness.models.delta import DeltaHeader, save_delta
from harness.models.network import UnsupportedMethod, build_segmenter
from harness.runs.folder import RunFolder
from harness.runs.metrics import save_confusions
from harness.runs.result import ONLY_FOUND, RunResult, about_only_found
from harness.runs.samples import save_picture, strip
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.util import provenance
from harness.util.seeds import derive

PICTURES = 4
"""How many evaluated images are saved as pictures."""


def execute(
    cell: Cell,
    store: RunStore,
    options: ExecutionOptions,
    *,
    force: bool = False,
    quiet: bool = False,
    expected_reuses: int = 0,
) -> RunFolder:
    """Execute or resume a cell's run, and return its finished folder. A finished run is returned as it is.

    `force` reruns a finished one from the start; `quiet` prints lines instead of a progress bar; `expected_reuses` is
    how many further runs are expected to see the same training images.

    Raises `UserError` for a mistake that is found before training starts, and then writes nothing; `RunEnded` for a run
    that ended without a result, as recorded in its folder; `KeyboardInterrupt` if stopped during evaluation.
    """
    make_reproducible()
    attempt = RunAttempt(cell, store, options, force=force, quiet=quiet)
    with attempt.locked():
        if attempt.is_needed():
            prepared = prepare(attempt, load_pretrained(cell))
            with attempt.failures_recorded():
                write(evaluate(train(prepared, expected_reuses)))
            attempt.fabric.barrier()
    return attempt.folder


def load_pretrained(cell: Cell) -> PretrainedBackbone:
    """The cell's backbone, on which the networks of several cells can be built. Raises `UserError`."""
    spec = cell.spec
    seed = derive(spec.seed, "backbone")
    return PretrainedBackbone(load_backbone(spec.backbone, cell.weights, seed, spec.budget.drop_path))


# ---- prepare ---------------------------------------------------------------------------------------------------------


def prepare(attempt: RunAttempt, backbone: PretrainedBackbone) -> Prepared:
    """Build the network and compute the cost of a step. Nothing is written unless the method is unsupported.

    Raises `UserError`, and `RunEnded` for a method that does not support the backbone.
    """
    cell = attempt.cell
    spec, dataset = cell.spec, cell.dataset
    if spec.budget.compile:
        check_compiler(attempt.fabric.device)
    all_train_samples, evaluation_samples = split_samples(dataset, spec.part, spec.budget.dev_fraction)
    train_samples = drawn(all_train_samples, spec.budget.train_fraction, spec.seed)
    copy = backbone.copy()
    try:
        network = build_segmenter(
            copy, cell.new_method(), spec.head, len(dataset.classes), spec.seed, spec.budget.auxiliary_head
        )
    except UnsupportedMethod:
        attempt.begin()
        with attempt.failures_recorded():
            raise
    return Prepared(
        attempt=attempt,
        backbone=backbone,
        network=network,
        # Compiled kernels have other last bits: frozen stages would not be the same if some runs computed them plainly.
        frozen_stages=0 if spec.budget.compile else backbone.count_frozen_stages(network.backbone),
        train_samples=train_samples,
        evaluation_samples=evaluation_samples,
        stream=TrainStream(dataset, train_samples, spec.budget, derive(spec.seed, "data"), copy.mean, copy.std),
        cache=FeatureCache(cell, attempt.store, backbone.sha256, copy.norm, attempt.fabric, attempt.options.cache_size),
        step_cost=cost.cached_step_cost(cell, network, attempt.store.cache),
        unrepeatable=kernel_that_does_not_repeat(network, spec.budget, attempt.fabric),
    )


# ---- train -----------------------------------------------------------------------------------------------------------


def train(prepared: Prepared, expected_reuses: int = 0) -> Trained:
    """Train for the whole budget, from the last checkpoint if there is one. Raises `RunEnded` or the actual error."""
    state = begin(prepared)
    training.train([state], batch_source([prepared], [state], expected_reuses))
    return finish_training(prepared, state)


def begin(prepared: Prepared) -> TrainState:
    """Open the run folder and its log; `training.train` takes the state."""
    attempt, network = prepared.attempt, prepared.network
    spec, dataset = attempt.cell.spec, attempt.cell.dataset
    attempt.begin()
    kind, colon, content = spec.weights.partition("sha256:")
    weights = f"weights sha256:{content[:12]}" if colon else f"weights {kind}"
    evaluated_on = "test" if spec.part == "report" else "dev"
    held_out = dataset.test_is_held_out if spec.part == "report" else not dataset.samples("dev")
    evaluated_on += f", {HELD_OUT}" if held_out else ""
    attempt.reporter.line(
        f"{spec.method} on {spec.backbone} ({weights}), {dataset.name}: training on {len(prepared.train_samples)} "
        f"images, evaluating on {len(prepared.evaluation_samples)} ({evaluated_on}); head {spec.head}, "
        f"budget {spec.budget.name}, seed {spec.seed}, {provenance.device_name(attempt.fabric.device)}"
    )
    backbone = network.backbone
    norm = f"images are normalised with {backbone.norm}, {backbone.norm_source}"
    for text in (*prepared.backbone.notes, norm):
        attempt.reporter.line(text)
    for text in (*filter(None, [backbone.norm_doubt]), *warnings(dataset, spec.budget)):
        attempt.reporter.line(f"warning: {text}")
    if prepared.unrepeatable is not None:
        attempt.reporter.line(
            f"warning: {prepared.unrepeatable} does not repeat to the bit on this device: the same run can end with "
            "different last digits"
        )
    if attempt.fabric.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(attempt.fabric.device)
    return TrainState(
        network,
        spec.budget,
        network.method.hyperparameters,
        spec.seed,
        attempt.fabric,
        attempt.folder.checkpoints,
        frozen_stages=prepared.frozen_stages,
        strict=prepared.unrepeatable is None,
        checkpoint_seconds=attempt.options.checkpoint_seconds,
        callbacks=RunCallbacks(attempt),
    )


def batch_source(prepared: Sequence[Prepared], states: Sequence[TrainState], expected_reuses: int = 0) -> BatchSource:
    """The batch source for the networks of runs that see the same images."""
    deepest = max(prepared, key=lambda one: one.frozen_stages)
    attempt, cache = deepest.attempt, deepest.cache
    budget, workers = attempt.cell.spec.budget, attempt.options.workers
    features = cache.training() if cache.limit and deepest.frozen_stages else None
    policy = FeatureCachePolicy(cache.limit, expected_reuses, budget.steps * budget.accumulate, attempt.reporter.line)
    return BatchSource(
        deepest.stream,
        budget,
        attempt.fabric,
        default_workers(attempt.options.threads) if workers is None else workers,
        states,
        features,
        policy,
    )


def finish_training(prepared: Prepared, state: TrainState, alone: bool = True) -> Trained:
    """`alone`: whether no other network was trained in this process at the same time."""
    return Trained(prepared, state.meters, _peak_memory(prepared, state.meters, alone))


def _peak_memory(prepared: Prepared, meters: Meters, alone: bool) -> int | None:
    """Bytes: on a GPU measured by its allocator, on a CPU computed from the shapes of a step.

    None if the number would not be the method's own: on a GPU with other networks or with cached features, on a CPU in
    another precision than float32 or compiled, where the computation does not hold.
    """
    device, budget = prepared.attempt.fabric.device, prepared.attempt.cell.spec.budget
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if alone and not meters.reused else None
    if prepared.step_cost is None or budget.precision != "fp32" or budget.compile:
        return None
    return prepared.step_cost.peak_bytes


class RunCallbacks(TrainCallbacks):
    """Shows the progress of the training and writes it to the run folder."""

    def __init__(self, attempt: RunAttempt):
        self._attempt, self._reporter, self._folder = attempt, attempt.reporter, attempt.folder
        self._budget = attempt.cell.spec.budget
        self._first_step, self._began = 0, time.monotonic()

    def on_start(self, step: int) -> None:
        self._attempt.step = self._first_step = step
        self._began = time.monotonic()
        if self._attempt.writes:
            for path in self._folder.checkpoints.damaged():
                self._reporter.line(f"{path} is damaged and was skipped")
            self._folder.cut_curve(step)
        if step:
            self._reporter.line(f"resuming from step {step}")
        self._reporter.start("train", self._budget.steps, step)

    def on_step(self, step: int, loss: float, lr: float) -> None:
        self._attempt.step = step
        self._folder.check_lock()
        images = (step - self._first_step) * self._budget.batch_size
        self._reporter.step(step, loss, lr, images / (time.monotonic() - self._began))

    def on_point(self, point: CurvePoint) -> None:
        self._reporter.point(point.step, point.loss, point.lr, point.miou_train, point.images_per_second)
        if self._attempt.writes:
            self._folder.append_curve(dataclasses.asdict(point))

    def on_checkpoint(self, step: int) -> None:
        if self._attempt.writes:
            self._folder.progress(step)


# ---- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(trained: Trained) -> Evaluated:
    """Evaluate once on all samples, and write confusion matrices and a few pictures. Processes share the work."""
    prepared = trained.prepared
    attempt, network, samples = prepared.attempt, prepared.network, prepared.evaluation_samples
    dataset, backbone, fabric = attempt.cell.dataset, network.backbone, attempt.fabric
    prefix = _evaluation_prefix(prepared)
    predictor = Predictor(
        network, backbone.mean, backbone.std, dataset.scale, attempt.cell.spec.budget, fabric.device, prefix
    )
    pictured = {round(i * (len(samples) - 1) / max(PICTURES - 1, 1)) for i in range(PICTURES)}
    attempt.reporter.start("evaluate", len(samples))

    def on_image(index: int, pair: Pair, prediction: np.ndarray) -> None:
        attempt.folder.check_lock()
        attempt.reporter.advance(index + 1)
        if index in pictured:
            path = attempt.folder.samples_path / (samples[index].name.replace("/", "-") + ".png")
            save_picture(path, strip(pair.image, pair.mask, prediction, dataset.palette))

    share = slice(fabric.global_rank, None, fabric.world_size)
    confusions = confusion_matrices(predictor, dataset, samples, on_image, share)
    if prefix is not None:
        prefix.close()
    if fabric.world_size > 1:
        confusions = _gather(confusions, len(samples), fabric)
    if attempt.writes:
        attempt.folder.check_lock()
        names, groups = ([getattr(sample, field) for sample in samples] for field in ("name", "group"))
        save_confusions(attempt.folder.confusions_path, names, groups, confusions)
    return Evaluated(trained, confusions, prefix.cached_share if prefix is not None else 0.0)


def _evaluation_prefix(prepared: Prepared) -> EvaluationPrefix | None:
    """None if every forward pass starts from images."""
    stages, cache = prepared.frozen_stages, prepared.cache
    if not stages or not cache.limit:
        return None
    backbone, device = prepared.network.backbone, prepared.attempt.fabric.device
    policy = EvaluationCachePolicy(cache.limit)
    return EvaluationPrefix(CachedPrefix(backbone, stages, device, cache.evaluation(), policy))


def _gather(matrices: np.ndarray, total: int, fabric: Fabric) -> np.ndarray:
    """Each process's matrices of samples rank, rank + world, ... -> those of all samples in order."""
    each = -(-total // fabric.world_size)
    padded = torch.zeros(each, *matrices.shape[1:], dtype=torch.int64, device=fabric.device)
    padded[: len(matrices)] = torch.from_numpy(matrices)
    gathered = fabric.all_gather(padded)
    assert isinstance(gathered, torch.Tensor)
    return gathered.transpose(0, 1).reshape(-1, *matrices.shape[1:])[:total].cpu().numpy()


# ---- write -----------------------------------------------------------------------------------------------------------


def write(evaluated: Evaluated) -> RunResult | None:
    """Write the delta and the result, which ends the run. Returns None in processes that do not write."""
    prepared = evaluated.trained.prepared
    attempt, cell = prepared.attempt, prepared.attempt.cell
    if not attempt.writes:
        return None
    attempt.folder.check_lock()
    header = DeltaHeader(
        spec=cell.spec,
        classes=tuple(cell.dataset.classes),
        palette=tuple(cell.dataset.palette),
        scale=cell.dataset.scale,
        backbone_sha256=prepared.backbone.sha256,
        bands=cell.dataset.bands,
        codes=cell.dataset.codes,
        stated_norm=prepared.network.backbone.stated_norm,
    )
    result = make_result(evaluated, delta_bytes=save_delta(attempt.folder.delta_path, prepared.network, header))
    if result.metrics.only_found:
        attempt.reporter.line(f"warning: {about_only_found([result.metrics.only_found])}: {ONLY_FOUND}")
    attempt.folder.finish(Outcome(RunState.DONE, step=cell.spec.budget.steps), result)
    attempt.folder.checkpoints.clear()
    return result
