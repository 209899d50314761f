"""Complete run folders without training: written by the harness's own code, with random confusion matrices.

The random numbers depend only on the arguments. The ground truth of an image is the same for every method and seed, so
that methods are paired like real ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from harness.runs.folder import RunFolder
from harness.runs.metrics import save_confusions
from harness.runs.result import RunResult
from harness.runs.samples import save_picture, strip
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.spec import PROTOCOL, Budget, Spec
from harness.util.files import digest, write_json
from tests.support.results import finish, make_result, scores_of

CLASSES = ("water", "forest", "crops", "snow")
PALETTE = ((30, 80, 200), (20, 120, 40), (220, 190, 60), (240, 240, 250))
BUDGET = Budget(name="brief", steps=40, batch_size=4, crop=(32, 32), warmup=4)
BACKBONE_PARAMETERS = 1_000_000
HEAD_PARAMETERS = 50_000
ACCURACIES = {"linear": 0.70, "spm": 0.76, "full": 0.78, "lora": 0.74, "norm": 0.71}
"""Default share of a class's pixels that a method predicts correctly."""
TRAINED = {"linear": 0, "spm": 35_494, "full": BACKBONE_PARAMETERS, "lora": 120_000, "norm": 4_000}
"""Default number of trained parameters of a method."""


def make_spec(method: str = "linear", **fields: Any) -> Spec:
    """A complete spec; `fields` replace the defaults."""
    dataset = fields.get("dataset", "meadow")
    values = {
        "hyperparameters": {"head_lr": 3e-3, "weight_decay": 0.01},
        "protocol": PROTOCOL,
        "backbone": "resnet18",
        "weights": "package:made==1",
        "dataset": dataset,
        "data_digest": digest(dataset),
        "head": "fpn:64",
        "budget": BUDGET,
        "seed": 0,
    }
    return Spec(method=method, **{**values, **fields})


def make_run(
    root: Path,
    spec: Spec,
    accuracy: float | None = None,
    trained: int | None = None,
    images: int = 12,
    classes: Sequence[str] = CLASSES,
    pictures: int = 2,
    matrices: np.ndarray | None = None,
    per_group: int = 1,
) -> RunFolder:
    """A finished run. `matrices` [N, K, K]: its confusion matrices, instead of random ones. `per_group`: images."""
    run = RunStore(root).folder(spec)
    run.begin(spec, attempt=1)
    if matrices is None:
        right = ACCURACIES.get(spec.method, 0.7) if accuracy is None else accuracy
        matrices = draw_matrices(spec, right, images, len(classes))
    count = TRAINED.get(spec.method, 10_000) if trained is None else trained
    names = [f"{number:03d}" for number in range(len(matrices))]
    groups = [f"scene {number // per_group}" for number in range(len(matrices))]
    save_confusions(run.confusions_path, names, groups, matrices)
    for step in range(spec.budget.steps // 4, spec.budget.steps + 1, spec.budget.steps // 4):
        point = {"step": step, "loss": 2 / (1 + step), "lr": 1e-3, "miou_train": 0.5, "images_per_second": 40.0}
        run.append_curve(point)
    for name in names[:pictures]:
        save_picture(run.samples_path / f"{name}.png", _picture(spec, name, len(classes)))
    _save_delta(run, spec, classes, count)
    finish(run, _result(spec, matrices, classes, count))
    return run


def _result(spec: Spec, matrices: np.ndarray, classes: Sequence[str], trained: int) -> RunResult:
    seconds = 10 + trained / 1e5
    return make_result(
        spec,
        metrics=scores_of(matrices, list(classes)),
        parameters={
            "method": trained,
            "head": HEAD_PARAMETERS,
            "trainable": trained + HEAD_PARAMETERS,
            "backbone": BACKBONE_PARAMETERS,
        },
        delta_bytes=4 * (trained + HEAD_PARAMETERS),
        train_seconds=seconds,
        images_per_second=spec.budget.steps * spec.budget.batch_size / seconds,
        peak_memory_bytes=2**28 + 8 * trained,
        train_flops=10**12 + 10**6 * trained,
    )


def make_older(run: RunFolder, **changes: Any) -> None:
    """The same run as of a version that recorded no digests, with other fields."""
    record = json.loads(run.result_path.read_text()) | {"digest": None, "files": {}} | changes
    write_json(run.result_path, record)


def end_run(root: Path, spec: Spec, state: Any, reason: str) -> RunFolder:
    """A run that ended without a result: `unsupported`, `failed`, `diverged`, `out_of_memory`, `interrupted`."""
    run = RunStore(root).folder(spec)
    run.begin(spec, attempt=1)
    run.finish(Outcome(RunState(state), reason))
    return run


def make_runs(
    root: Path,
    methods: Sequence[str] = ("linear", "spm", "full"),
    backbones: Sequence[str] = ("resnet18",),
    datasets: Sequence[str] = ("meadow",),
    seeds: Sequence[int] = (0, 1),
    accuracies: Mapping[str, float] = ACCURACIES,
    **how: Any,
) -> list[RunFolder]:
    """Every finished run of a grid; `how` goes to `make_run`."""
    return [
        make_run(root, make_spec(method, backbone=backbone, dataset=dataset, seed=seed), accuracies.get(method), **how)
        for backbone in backbones
        for dataset in datasets
        for method in methods
        for seed in seeds
    ]


def make_search(root: Path, name: str = "spm-resnet18-meadow-0a1b2c3d", trials: int = 6) -> Path:
    """A search's folder with trials on the dev part, of which the last failed, and with their runs in `root`."""
    folder = root / "searches" / name
    base = make_spec("spm", part="dev")
    draw = np.random.default_rng(trials)
    rows = []
    for number in range(trials):
        settings = {"lr": float(10 ** draw.uniform(-4, -2)), "hidden": int(draw.integers(8, 64))}
        spec = base.model_copy(update={"hyperparameters": base.hyperparameters | settings})
        last = number == trials - 1
        run = end_run(root, spec, "failed", "out of luck") if last else make_run(root, spec, draw.uniform(0.6, 0.8))
        rows.append(
            {
                "number": number,
                "state": "failed" if last else "complete",
                "settings": settings,
                "fingerprint": run.fingerprint,
                "values": None if last else [run.read_result().metrics.miou],
                "steps": spec.budget.steps,
                "reason": "out of luck" if last else None,
            }
        )
    definition = base.model_dump(
        mode="json", include={"method", "method_code", "backbone", "weights", "dataset", "data_digest", "head",
                              "budget"}
    )  # fmt: skip
    definition["seeds"] = [base.seed]
    space = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "hidden": {"low": 8, "high": 64, "integer": True}}
    fixed = {"head_lr": 3e-3, "weight_decay": 0.01}
    write_json(folder / "search.json", {**definition, "fixed": fixed, "space": space})
    write_json(folder / "trials.json", rows)
    write_json(folder / "importances.json", {"lr": 0.8, "hidden": 0.2})
    return folder


def draw_matrices(spec: Spec, accuracy: float, images: int, classes: int) -> np.ndarray:
    """int64 [N, K, K] whose row sums depend only on dataset and image; about `accuracy` of the pixels are right."""
    truth = np.random.default_rng(_number(spec.dataset)).integers(20, 400, (images, classes))
    draw = np.random.default_rng(_number(spec.fingerprint))
    hardness = np.random.default_rng(_number(spec.dataset) + 1).normal(0, 0.05, (images, 1))
    matrices = np.zeros((images, classes, classes), np.int64)
    hits = draw.binomial(truth, np.clip(accuracy + hardness + draw.normal(0, 0.005), 0.02, 0.98))
    for image, label in np.ndindex(images, classes):
        others = [other for other in range(classes) if other != label]
        wrong = draw.multinomial(truth[image, label] - hits[image, label], [1 / len(others)] * len(others))
        matrices[image, label, others] = wrong
        matrices[image, label, label] = hits[image, label]
    return matrices


def _picture(spec: Spec, name: str, classes: int, side: int = 32) -> np.ndarray:
    truth = np.random.default_rng(int(name)).integers(0, classes, (4, 4)).repeat(side // 4, 0).repeat(side // 4, 1)
    draw = np.random.default_rng(_number(spec.fingerprint + name))
    wrong = draw.random(truth.shape) < 0.2
    prediction = np.where(wrong, draw.integers(0, classes, truth.shape), truth).astype(np.uint8)
    palette = [PALETTE[label % len(PALETTE)] for label in range(classes)]
    image = np.array(palette)[truth] + draw.normal(0, 15, (*truth.shape, 3))
    return strip(image.clip(0, 255).astype(np.uint8), truth.astype(np.uint8), prediction, palette)


def _save_delta(run: RunFolder, spec: Spec, classes: Sequence[str], trained: int) -> None:
    header = {
        "spec": spec.model_dump(mode="json"),
        "classes": list(classes),
        "palette": [PALETTE[label % len(PALETTE)] for label in range(len(classes))],
        "scale": None,
        "backbone_sha256": "0" * 64,
    }
    tensors = {"head.weight": np.full(4, trained, np.float32)}
    save_file(tensors, run.delta_path, metadata={"format": "harness-delta-1", "header": json.dumps(header)})


def _number(text: str) -> int:
    return int(digest(text)[:12], 16)
