"""What must hold on a GPU as on a CPU: the contract, and runs that repeat, resume and share a process to the bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from benchmarks.gpu import Plan
from benchmarks.measure import Table
from benchmarks.pool import Pool, reason
from harness.cells.resolve import Cell, Request, Resolver
from harness.contract.cases import Case, deterministic_mode, gradients_of
from harness.contract.matrix import check_method, tiny_backbones
from harness.engine.device import make_reproducible
from harness.engine.options import ExecutionOptions
from harness.engine.run import execute
from harness.engine.side_by_side import execute_side_by_side
from harness.method import methods
from harness.runs.folder import RunFolder
from harness.runs.state import RunEnded
from harness.runs.store import RunStore
from harness.spec import Precision, budget_from

BATCH, SIDE, CLASSES = 4, 96, 4


def contract(plan: Plan, pool: Pool) -> Table:
    table = Table(
        "The contract on this device",
        [
            "network",
            "methods that pass",
            "unsupported",
            "broken",
            "gradients, from the CPU's",
            "kernels that do not repeat",
        ],
        "Every check of `harness check` but the one with two processes, on one tiny network of each family. "
        "*Gradients*: those of one step on this device, the norm of their difference from the CPU's over their norm, "
        "of the method where it is largest. *Kernels*: those that torch warns of.",
    )
    names = plan.contract_methods or methods.names()
    jobs = [(name, tiny_backbones()[family], plan.device) for family in plan.contract_families for name in names]
    states: dict[str, Counter[str]] = {}
    kernels: dict[str, set[str]] = {}
    gradients: dict[str, float] = {}
    for (name, backbone, _), found in pool.map(_contract_of, jobs):
        if isinstance(found, Exception):
            found = "broken", [reason(found)], set(), 0.0
        state, details, warned, difference = found
        states.setdefault(backbone, Counter())[state] += 1
        kernels.setdefault(backbone, set()).update(warned)
        gradients[backbone] = max(gradients.get(backbone, 0.0), difference)
        table.notes += [f"{name} on {backbone}: {detail}" for detail in details]
    for backbone, counts in states.items():
        numbers = (counts[state] for state in ("passes", "unsupported", "broken"))
        table.add(backbone, *numbers, f"{gradients[backbone]:.1e}", ", ".join(sorted(kernels[backbone])) or "none")
    return table


def _contract_of(name: str, backbone: str, device: str) -> tuple[str, list[str], set[str], float]:
    make_reproducible()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcomes = check_method(name, [backbone], device)
    broken = [f"{outcome.check}: {outcome.detail}" for outcome in outcomes if outcome.status == "broken"]
    unsupported = any(outcome.status == "unsupported" for outcome in outcomes)
    kernels = {match[1] for one in caught if (match := re.match(r"(\w+) does not have a determ", str(one.message)))}
    state = "broken" if broken else "unsupported" if unsupported else "passes"
    return state, broken, kernels, 0.0 if unsupported else _gradients_differ(name, backbone, device)


def _gradients_differ(name: str, backbone: str, device: str) -> float:
    """The norm of the difference of a step's gradients on the device and on the CPU, over the norm of the CPU's."""
    here, expected = (
        gradients_of(deterministic_mode(Case(methods.get(name), backbone, on).build()))[1] for on in (device, "cpu")
    )
    difference = torch.cat([(here[key].cpu() - gradient).flatten() for key, gradient in expected.items()]).norm()
    return (difference / torch.cat([gradient.flatten() for gradient in expected.values()]).norm()).item()


def repeats(plan: Plan, pool: Pool, scratch: Path) -> Table:
    table = Table(
        "Runs that must be equal to the bit",
        ["backbone", "method", "repeated", "resumed", "side by side", "mIoU", "kernels that do not repeat"],
        f"Whole runs of {plan.small_steps} steps of {BATCH} images of {SIDE}x{SIDE} with random weights: the trained "
        "tensors and the confusion matrices of a second run, of one that was interrupted and resumed, and of one that "
        "shares its process with another.",
    )
    dataset = made_dataset(scratch / "made")
    jobs = [(plan, dataset, backbone, method) for backbone in plan.small for method in plan.small_methods]
    for (_, _, backbone, method), found in pool.map(_repeats_of, jobs):
        if isinstance(found, Exception):
            table.notes.append(f"{method} on {backbone}: {reason(found)}")
        else:
            table.add(backbone, method, *found)
    return table


def _repeats_of(plan: Plan, dataset: Path, backbone: str, method: str) -> list[str]:
    place = dataset.parent / f"{backbone}-{method}"
    runs = _Runs(plan, dataset, backbone)
    first = runs.execute(runs.cell(method), place / "first")
    second = runs.execute(runs.cell(method), place / "second")
    resumed, stopped_at = runs.interrupted(runs.cell(method), place / "resumed")
    cells = [runs.cell(method), runs.cell(method, head_lr=2e-3)]
    store = runs.store(place / "together")
    execute_side_by_side(cells, store, runs.options(place / "together"), quiet=True)
    warned = re.findall(r"warning: (\w+) does not repeat", first.log_path.read_text(encoding="utf-8"))
    return [
        _difference(first, second) or "equal",
        f"{_difference(first, resumed) or 'equal'} (after step {stopped_at})",
        _difference(first, store.folder(cells[0].spec)) or "equal",
        f"{first.read_result().metrics.miou:.4f}",
        ", ".join(warned) or "none",
    ]


def study(plan: Plan, scratch: Path) -> Table:
    table = Table(
        "A study: two jobs at once on this device",
        ["backbone", "jobs", "cells of a job", "seconds", "states"],
        "`harness compare` of three methods and two seeds, with the processes that it starts.",
    )
    dataset = made_dataset(scratch / "made")
    backbone = plan.small[0]
    for together in (1, 2):
        place = scratch / f"study-{together}"
        place.mkdir()
        fields = {
            "title": "check",
            "methods": ["linear", "spm", "full"],
            "backbones": [{"backbone": backbone, "weights": "random"}],
            "datasets": [str(dataset)],
            "heads": ["fpn:16"],
            "seeds": 2,
            "budget": {"steps": plan.small_steps, "batch_size": BATCH, "crop": [SIDE, SIDE]},
        }
        (place / "study.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
        flags = ["--runs", str(place / "runs"), "--tracking", "off", "--device", plan.device.partition(":")[0]]
        flags += ["--jobs", "2", "--together", str(together), "--workers", "0", "--json", "--quiet"]
        command = [sys.executable, "-m", "harness", "compare", str(place / "study.yaml"), *flags]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        found = [RunFolder(path).status() for path in (place / "runs").iterdir()]
        states = Counter(status.state.value for status in found if status is not None)
        table.add(backbone, 2, together, f"{seconds:.0f}", ", ".join(f"{n} {s}" for s, n in states.items()))
        if done.returncode:
            table.notes.append(f"exit code {done.returncode}: {done.stderr[-500:]}")
    return table


def precision(plan: Plan, pool: Pool, scratch: Path) -> Table:
    kinds: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16") if plan.device != "cpu" else ("fp32", "tf32")
    table = Table(
        "Precision",
        ["backbone", "method", *(f"mIoU, {kind}" for kind in kinds)],
        "The same runs in each precision of a budget: a precision that does not work shows as a lower score.",
    )
    dataset = made_dataset(scratch / "made")
    cases = [(backbone, method) for backbone in plan.small for method in plan.small_methods]
    jobs = [(plan, dataset, *case, kind) for case in cases for kind in kinds]
    scores: dict[tuple[str, str], list[str]] = {case: [] for case in cases}
    for (_, _, backbone, method, kind), found in pool.map(_score_in, jobs):
        if isinstance(found, Exception):
            table.notes.append(f"{method} on {backbone}, {kind}: {reason(found)}")
        scores[backbone, method].append("failed" if isinstance(found, Exception) else f"{found:.4f}")
    for case, row in scores.items():
        table.add(*case, *row)
    return table


def _score_in(plan: Plan, dataset: Path, backbone: str, method: str, kind: Precision) -> float:
    runs = _Runs(plan, dataset, backbone, kind)
    run = runs.execute(runs.cell(method), dataset.parent / f"{backbone}-{method}-{kind}")
    return run.read_result().metrics.miou


class _Runs:
    """Whole runs on the made dataset."""

    def __init__(self, plan: Plan, dataset: Path, backbone: str, kind: Precision = "fp32"):
        self._plan, self._dataset, self._backbone = plan, dataset, backbone
        fields = {"steps": plan.small_steps, "batch_size": BATCH, "crop": [SIDE, SIDE], "warmup": 5, "precision": kind}
        self._budget = budget_from(fields, "gpu check")

    def store(self, place: Path) -> RunStore:
        """A store of its own, but with the counted costs of steps of all: counting takes longer than a step."""
        return RunStore(place, cache=self._dataset.parent / f"resolved-{os.getpid()}" / ".cache")

    def cell(self, method: str, **settings: float) -> Cell:
        resolver = Resolver(RunStore(self._dataset.parent / f"resolved-{os.getpid()}"), self._dataset.parent)
        return resolver(
            Request(
                method=method,
                backbone=self._backbone,
                weights="random",
                dataset=str(self._dataset),
                head="fpn:16",
                budget=self._budget,
                seed=0,
                settings=settings,
            )
        )

    def options(self, place: Path) -> ExecutionOptions:
        return ExecutionOptions(
            runs=place, tracking="off", workers=0, cache_size=0, device=self._plan.device, checkpoint_seconds=1e9
        )

    def execute(self, cell: Cell, place: Path) -> RunFolder:
        return execute(cell, self.store(place), self.options(place), quiet=True)

    def interrupted(self, cell: Cell, place: Path) -> tuple[RunFolder, int]:
        """A run that was interrupted by Ctrl-C and resumed, and the step that it had reached."""
        folder = RunStore(place).folder(cell.spec)
        watcher = threading.Thread(
            target=_interrupt_once_training, args=(folder, self._plan.small_steps // 3), daemon=True
        )
        watcher.start()
        stopped_at = 0
        try:
            self.execute(cell, place)
        except RunEnded:
            status = folder.status()
            stopped_at = status.step if status else 0
        watcher.join()
        return self.execute(cell, place), stopped_at


def _interrupt_once_training(folder: RunFolder, step: int) -> None:
    """Send this process a Ctrl-C once the run has trained that many steps."""
    while len(folder.curve()) < step:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGINT)


def _difference(one: RunFolder, other: RunFolder) -> str:
    """How two runs differ, as text; empty if all tensors and matrices are equal to the bit."""
    trained = [load_file(run.delta_path) for run in (one, other)]
    if trained[0].keys() != trained[1].keys() or any(not torch.equal(trained[0][k], trained[1][k]) for k in trained[0]):
        return f"trained tensors differ by {_largest(one, other):.1e}"
    with np.load(one.confusions_path) as ours, np.load(other.confusions_path) as theirs:
        same = all(np.array_equal(ours[key], theirs[key]) for key in ours.files)
    return "" if same else "the tensors are equal, the confusion matrices are not"


def _largest(one: RunFolder, other: RunFolder) -> float:
    """The largest difference of a trained tensor, relative to its own largest value."""
    ours, theirs = load_file(one.delta_path), load_file(other.delta_path)
    return max(
        ((ours[key].float() - theirs[key].float()).abs().max() / ours[key].float().abs().max().clamp(min=1e-12)).item()
        for key in ours
    )


def made_dataset(root: Path, images: int = 32) -> Path:
    """A folder with images whose colour is their class, in blocks; made once."""
    description = root / "dataset.yaml"
    if description.exists():
        return description
    draw = np.random.default_rng(0)
    colours = draw.integers(30, 226, (CLASSES, 3))
    for split, count in (("train", images), ("val", images // 4)):
        for name in range(count):
            labels = draw.integers(0, CLASSES, (4, 4)).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1).astype(np.uint8)
            noisy = np.clip(colours[labels] + draw.normal(0, 40, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
            for kind, content in (("images", noisy), ("masks", labels)):
                path = root / kind / split / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
    fields: dict[str, Any] = {"name": "made", "classes": [f"class {index}" for index in range(CLASSES)]}
    description.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return description
