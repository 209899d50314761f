"""A few steps of a cell at its real shapes, and images of the largest size: whether it works, and what it takes."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from harness.cells.resolve import Cell
from harness.engine.attempt import RunAttempt
from harness.engine.device import default_workers, make_reproducible
from harness.engine.evaluation import Predictor
from harness.engine.failures import explained, outcome_of
from harness.engine.options import ExecutionOptions
from harness.engine.phases import Prepared
from harness.engine.run import batch_source, begin, load_pretrained, prepare
from harness.runs.state import Outcome
from harness.runs.store import RunStore
from harness.util.device_clock import clock
from harness.util.progress import Reporter

STEPS = 6
"""The first warms up; the median of the others counts."""


@dataclass(frozen=True)
class Rehearsal:
    """What a step and an image take: the median of those that were executed after the first."""

    start_seconds: float
    """Loading the backbone and building the network, and compiling it where the budget says so."""
    step_seconds: float
    image_seconds: float
    """Evaluation of one image of the largest size."""
    peak_bytes: int | None
    """On a GPU measured, evaluation included; on a CPU computed from the shapes of a step."""
    run_seconds: float
    """The whole run, estimated from these: start, all steps, all images."""
    delta_bytes: int
    """The trained tensors that a run keeps on disk: nearly all of its folder."""


def rehearse(cell: Cell, options: ExecutionOptions) -> Rehearsal | Outcome:
    """Executed in a temporary folder: nothing is kept. Returns the outcome of a cell that fails.

    Uses as many torch threads as the options say, and restores their number. Raises `UserError` for a device that is
    not available, and `KeyboardInterrupt`.
    """
    make_reproducible()
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    with tempfile.TemporaryDirectory() as place:
        store = RunStore(Path(place))
        attempt = RunAttempt(cell, store, replace(options, runs=store.root, cache_size=0, workers=0))
        attempt.reporter = Reporter(silent=True)
        try:
            started = time.monotonic()
            prepared = prepare(attempt, load_pretrained(cell))
            workers = default_workers(options.threads) if options.workers is None else options.workers
            return _measure(prepared, time.monotonic() - started, workers)
        except Exception as error:
            return outcome_of(explained(error, attempt.folder.path, attempt.step))
        finally:
            torch.set_num_threads(threads)
            gc.collect()  # the next cell gets the device's memory
            torch.cuda.empty_cache()


def _measure(prepared: Prepared, start_seconds: float, workers: int) -> Rehearsal:
    attempt = prepared.attempt
    budget, device = attempt.cell.spec.budget, attempt.fabric.device
    state = begin(prepared)
    state.begin()
    source = batch_source([prepared], [state])  # without processes of its own: see `rehearse`
    passes = source.passes(0)
    loading, learning = [], []
    for _ in range(min(STEPS, budget.steps)):
        started = clock(device)
        batches = [next(passes) for _ in range(budget.accumulate)]
        loaded = clock(device)
        state.learn(batches)
        loading.append(loaded - started)
        learning.append(clock(device) - loaded)
    source.close()
    data_seconds, step_seconds = _typical(loading), _typical(learning)
    if budget.compile:
        start_seconds += learning[0]
    # Loading processes work beside the network: the slower of the two sets the pace.
    step_seconds = max(step_seconds, data_seconds / workers) if workers else step_seconds + data_seconds
    image_seconds = _evaluate_largest(prepared)
    peak = prepared.step_cost.peak_bytes if prepared.step_cost else None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    run_seconds = start_seconds + budget.steps * step_seconds + len(prepared.evaluation_samples) * image_seconds
    delta_bytes = sum(tensor.nbytes for tensor in prepared.network.delta_state().values())
    return Rehearsal(start_seconds, step_seconds, image_seconds, peak, run_seconds, delta_bytes)


def _evaluate_largest(prepared: Prepared) -> float:
    """Seconds of a batch of blank images of the largest size, per image."""
    attempt, network = prepared.attempt, prepared.network
    cell, device = attempt.cell, attempt.fabric.device
    network.eval()
    backbone, budget = network.backbone, cell.spec.budget
    predictor = Predictor(network, backbone.mean, backbone.std, cell.dataset.scale, budget, device)
    count = min(budget.batch_size, len(prepared.evaluation_samples))
    images = [np.zeros((*cell.dataset.working_sizes.largest, 3), np.uint8)] * count
    seconds = []
    for _ in range(STEPS):
        started = clock(device)
        predictor(images)
        seconds.append(clock(device) - started)
    return _typical(seconds) / count


def _typical(seconds: list[float]) -> float:
    return median(seconds[1:] or seconds)
