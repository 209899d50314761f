"""What tests of studies share: a study file of tiny cells, and runs that were finished long ago."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from harness.runs import RunFolder
from harness.spec import Spec

BUDGET = {"steps": 12, "batch_size": 4, "crop": [32, 32], "warmup": 2}


def write_study(path: Path, dataset: Path, **fields: Any) -> Path:
    """Cells of the tiny size of `tiny_cell.py`; `fields` are over it."""
    values = {
        "budget": BUDGET,
        "methods": ["linear", "spm"],
        "backbones": [{"backbone": "resnet10t", "weights": "random"}],
        "datasets": [str(dataset)],
        "heads": ["fpn:16"],
        "seeds": 2,
        **fields,
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def finish(runs: Path, spec: Spec, miou: float = 0.5) -> RunFolder:
    """A finished run, without the hours: what planning reads of it."""
    run = RunFolder(runs / spec.fingerprint)
    run.begin(spec, 1)
    run.write_result(
        {
            "status": "done",
            "fingerprint": spec.fingerprint,
            "spec": spec.model_dump(mode="json"),
            "metrics": {"miou": miou, "macc": miou, "aacc": miou, "mdice": miou, "absent_classes": 0, "per_class": []},
            "parameters": {"method": 1, "head": 1, "trainable": 2, "backbone": 10},
            "delta_bytes": 100,
            "train_seconds": 10.0,
            "images_per_second": 1.0,
        }
    )
    run.set_status("done", step=spec.budget.steps)
    return run
