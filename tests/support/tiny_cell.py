"""One tiny real cell: images whose classes are their colours, a budget of a few steps, and the command that runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

COLOURS = {"brick": (200, 40, 40), "grass": (40, 180, 60), "water": (30, 60, 200)}
STEPS = 12


def make_dataset(root: Path, train: int = 8, test: int = 5, side: int = 64, ignored_rows: int = 4) -> Path:
    """A folder with `dataset.yaml`: three vertical bands of noisy colour, their order and widths by chance."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            bounds = np.sort(draw.integers(side // 8, side - side // 8, 2))
            columns = draw.permutation(3)[np.searchsorted(bounds, np.arange(side), side="right")]
            mask = np.repeat(columns[None].astype(np.uint8), side, axis=0)
            image = np.array(list(COLOURS.values()))[mask] + draw.normal(0, 20, (side, side, 3))
            mask[:ignored_rows] = 255
            for kind, pixels in (("images", image.clip(0, 255).astype(np.uint8)), ("masks", mask)):
                path = root / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    (root / "dataset.yaml").write_text(yaml.safe_dump({"classes": list(COLOURS)}), encoding="utf-8")
    return root


def make_budget(path: Path, **fields: Any) -> Path:
    """A budget file of twelve small steps; `fields` are over it."""
    values = {"steps": STEPS, "batch_size": 4, "crop": [32, 32], "warmup": 2, **fields}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def environment(**variables: str) -> dict[str, str]:
    """This process's, without what a developer's shell may say of the harness; one thread, as the cores are few."""
    foreign = ("HARNESS_", "MLFLOW_", "RANK", "WORLD_SIZE", "LOCAL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", **variables}


def harness(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m harness ARGUMENTS`, to its end."""
    options = {"capture_output": True, "text": True, "env": environment(), "timeout": 300, **options}
    return subprocess.run([sys.executable, "-m", "harness", *map(str, arguments)], **options)


def run_arguments(dataset: Path, budget: Path, runs: Path, *more: str | Path) -> list[str | Path]:
    """`run` of the tiny cell, everything given; what comes in `more` goes before it."""
    cell = ["--method", "spm", "--backbone", "test_resnet", "--weights", "random", "--head", "fpn:16"]
    places = ["--dataset", dataset, "--budget", budget, "--runs", runs, "--device", "cpu", "--workers", "0"]
    return ["run", *cell, *places, "--tracking", "off", *more]


def fresh_python(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout
