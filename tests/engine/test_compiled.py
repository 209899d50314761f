"""A budget with `compile`: the same training within rounding, and the same bits however a run is executed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.cells.resolve import Cell, resolve
from harness.engine.options import ExecutionOptions
from harness.engine.run import execute
from harness.engine.side_by_side import execute_side_by_side
from harness.runs.store import RunStore
from tests.support.in_process import runs_in
from tests.support.run_commands import assert_same, request
from tests.support.tiny_cell import environment, harness, make_budget, run_arguments

pytestmark = [
    pytest.mark.exhaustive,  # compiling a network takes half a minute
    pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
]


def test_compiled_runs_are_close_to_plain_ones_and_the_same_side_by_side(
    colours: Path, tiny: Path, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    compiled = make_budget(tmp_path / "compiled.yaml", compile=True)

    def options(runs: Path) -> ExecutionOptions:
        return ExecutionOptions(runs=runs, device="cpu", workers=0, tracking="off")

    def cells(budget: Path, runs: Path) -> list[Cell]:
        fields = [{"settings": {"head_lr": rate}} for rate in (0.003, 0.01)]
        return [resolve(request(colours, budget, method="spm", **one), RunStore(runs), runs) for one in fields]

    places = {name: tmp_path / name for name in ("plain", "alone", "together")}
    plain = execute(cells(tiny, places["plain"])[0], RunStore(places["plain"]), options(places["plain"]), quiet=True)
    alone = [
        execute(cell, RunStore(places["alone"]), options(places["alone"]), quiet=True)
        for cell in cells(compiled, places["alone"])
    ]
    pair, store = cells(compiled, places["together"]), RunStore(places["together"])
    execute_side_by_side(pair, store, options(places["together"]), quiet=True)

    for cell, folder in zip(pair, alone, strict=True):
        assert_same(store.folder(cell.spec), folder)
    result = alone[0].read_result()
    assert result.peak_memory_bytes is None
    assert result.reuse.training == 0
    # Not the tensors: the gradient of a bias before a batch norm is rounding alone, of which AdamW makes a whole step.
    ours, theirs = ([point["loss"] for point in folder.curve()] for folder in (alone[0], plain))
    assert ours != theirs
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_missing_compiler_is_one_line_and_leaves_no_run(colours: Path, tmp_path: Path) -> None:
    compiled, runs = make_budget(tmp_path / "compiled.yaml", compile=True), tmp_path / "runs"
    variables = environment(CXX="no-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    done = harness(*run_arguments(colours, compiled, runs), env=variables)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "torch.compile does not work here: " in done.stderr and "no-compiler" in done.stderr
    assert runs_in(runs) == []
