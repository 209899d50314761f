"""A valid result without training, for tests of planning, searches and reports."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.runs.folder import RunFolder
from harness.runs.metrics import metrics
from harness.runs.result import RunResult
from harness.runs.state import Outcome, RunState
from harness.spec import Spec


def make_result(spec: Spec, **changes: Any) -> RunResult:
    """`changes` replace top-level fields; of `metrics` and `parameters` those that they name."""
    fields: dict[str, Any] = {
        "fingerprint": spec.fingerprint,
        "spec": spec,
        "metrics": {"miou": 0.5, "macc": 0.5, "aacc": 0.5, "mdice": 0.5, "absent_classes": 0, "per_class": []},
        "parameters": {"method": 1, "head": 1, "trainable": 2, "backbone": 10},
        "delta_bytes": 100,
        "steps": spec.budget.steps,
        "images": spec.budget.steps * spec.budget.batch_size,
        "train_seconds": 10.0,
        "images_per_second": 1.0,
        "data_wait": 0.05,
        "peak_memory_bytes": 2**28,
        "train_flops": 10**12,
        "inference": {"adapted_seconds": 0.011, "backbone_seconds": 0.010, "ratio": 1.1},
        "reuse": {"frozen_stages": 0, "training": 0, "evaluation": 0, "spent_seconds": 10.0},
        "provenance": {
            "harness": "0.1.0",
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": False,
            "packages": {"python": "3.11"},
            "method": {"package": "segmentation-tuning-harness"},
            "device": "a made-up processor",
            "processes": 1,
            "threads": 1,
            "seed": spec.seed,
            "weights": {"identity": spec.weights, "given": "auto", "tensors_sha256": "0" * 64},
        },
    }
    for part in ("metrics", "parameters"):
        changes[part] = fields[part] | changes.get(part, {})
    return RunResult.model_validate(fields | changes)


def finish(run: RunFolder, result: RunResult) -> None:
    run.finish(Outcome(RunState.DONE, step=result.steps), result)


def scores_of(matrices: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """`metrics` of a result, from confusion matrices [N, K, K]."""
    found = metrics(matrices.sum(0))
    per_class = [
        {"name": name, "iou": iou, "acc": acc, "dice": dice}
        for name, iou, acc, dice in zip(classes, found.iou, found.acc, found.dice, strict=True)
    ]
    overall = {key: getattr(found, key) for key in ("miou", "macc", "aacc", "mdice")}
    return {**overall, "absent_classes": found.absent, "per_class": per_class}
