"""Builds the result of a run from its phases: scores, costs and provenance."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from harness.cells.plugins import method_origin
from harness.data.base import SegmentationDataset
from harness.data.fit import warnings
from harness.engine.cost import arithmetic_of, inference_seconds
from harness.engine.phases import Evaluated, Prepared
from harness.models.network import apply_memory_format
from harness.runs.metrics import metrics
from harness.runs.result import ClassScores, Inference, Parameters, Provenance, Reuse, RunResult, Scores
from harness.util import provenance
from harness.util.files import digest


def make_result(evaluated: Evaluated, delta_bytes: int) -> RunResult:
    """Build the result. Measures the inference time on the device; everything else was computed before."""
    trained = evaluated.trained
    prepared, meters = trained.prepared, trained.meters
    cell = prepared.attempt.cell
    steps = cell.spec.budget.steps
    return RunResult(
        fingerprint=cell.spec.fingerprint,
        spec=cell.spec,
        metrics=_scores(cell.dataset, evaluated.confusions),
        parameters=Parameters(**dataclasses.asdict(prepared.network.count_parameters())),
        delta_bytes=delta_bytes,
        steps=steps,
        images=meters.images,
        train_seconds=meters.seconds,
        images_per_second=meters.images / meters.seconds,
        data_wait=meters.data_seconds / meters.seconds,
        peak_memory_bytes=trained.peak_memory_bytes,
        train_flops=prepared.step_cost.flops * steps if prepared.step_cost else None,
        inference=_inference(prepared),
        reuse=Reuse(
            frozen_stages=prepared.frozen_stages,
            training=meters.reused / steps,
            evaluation=evaluated.cached_share,
            spent_seconds=meters.spent,
        ),
        provenance=_provenance(prepared),
    )


def _scores(dataset: SegmentationDataset, confusions: np.ndarray) -> Scores:
    found = metrics(confusions.sum(0))
    per_class = [
        ClassScores(name=name, iou=iou, acc=acc, dice=dice)
        for name, iou, acc, dice in zip(dataset.classes, found.iou, found.acc, found.dice, strict=True)
    ]
    return Scores(
        miou=found.miou,
        macc=found.macc,
        aacc=found.aacc,
        mdice=found.mdice,
        absent_classes=found.absent,
        per_class=tuple(per_class),
    )


def _inference(prepared: Prepared) -> Inference:
    """Inference times. Networks on one backbone that only differ in their learning rates are timed once."""
    cell, device, backbone = prepared.attempt.cell, prepared.attempt.fabric.device, prepared.backbone
    key = digest(arithmetic_of(cell))
    if key not in backbone.inference_seconds:
        frozen = apply_memory_format(prepared.attempt.fabric.to_device(backbone.copy()), cell.spec.budget)
        adapted = prepared.network.backbone.eval()
        backbone.inference_seconds[key] = inference_seconds(adapted, frozen, cell.spec.budget.crop, device)
    adapted_seconds, backbone_seconds = backbone.inference_seconds[key]
    return Inference(
        adapted_seconds=adapted_seconds, backbone_seconds=backbone_seconds, ratio=adapted_seconds / backbone_seconds
    )


def _provenance(prepared: Prepared) -> Provenance:
    cell, fabric = prepared.attempt.cell, prepared.attempt.fabric
    spec, weights, backbone = cell.spec, cell.weights, prepared.network.backbone
    fields: dict[str, Any] = {
        **provenance.code(),
        "packages": provenance.packages(),
        "method": method_origin(cell.method),
        "device": provenance.device_name(fabric.device),
        "processes": fabric.world_size,
        "threads": torch.get_num_threads(),
        "seed": spec.seed,
        "weights": {
            "identity": spec.weights,
            "given": weights.origin,
            "tensors_sha256": prepared.backbone.sha256,
        },
        "normalisation": {
            "mean": backbone.mean,
            "std": backbone.std,
            "source": backbone.norm_source,
            **({"warning": backbone.norm_doubt} if backbone.norm_doubt else {}),
        },
        "data": {
            "name": spec.dataset,
            "sha256": spec.data_digest,
            "images_to_train_on": len(prepared.train_samples),
            "images_to_report_on": len(prepared.evaluation_samples),
            "warnings": warnings(cell.dataset, spec.budget),
        },
    }
    return Provenance.model_validate(fields)
