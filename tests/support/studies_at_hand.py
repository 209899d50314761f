"""For tests of studies: a study file of tiny cells, and finished runs without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from harness.runs.folder import RunFolder
from harness.spec import Spec
from tests.support import results

BUDGET = {"steps": 12, "batch_size": 4, "crop": [32, 32], "warmup": 2}


def write_study(path: Path, dataset: Path, **fields: Any) -> Path:
    """Cells of the size of `tiny_cell.py`; `fields` replace those of the file."""
    values = {
        "budget": BUDGET,
        "methods": ["linear", "spm"],
        "backbones": [{"backbone": "test_resnet", "weights": "random"}],
        "datasets": [str(dataset)],
        "heads": ["fpn:16"],
        "seeds": 2,
        **fields,
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def finish(runs: Path, spec: Spec, miou: float = 0.5) -> RunFolder:
    """A finished run, without training."""
    run = RunFolder(runs / spec.fingerprint)
    run.begin(spec, 1)
    scores = dict.fromkeys(("miou", "macc", "aacc", "mdice"), miou)
    results.finish(run, results.make_result(spec, metrics=scores))
    return run
