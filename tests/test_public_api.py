"""The public names of `harness`: cheap to import, and `harness.run` is `harness run`."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import harness
from harness.cells.resolve import Request
from harness.engine.options import ExecutionOptions
from harness.errors import UserError
from tests.support.tiny_cell import environment


def test_import_loads_nothing_heavy() -> None:
    code = """
import sys, time
began = time.process_time()
import harness
seconds = time.process_time() - began
assert not {"torch", "numpy", "pydantic", "yaml", "typer"} & set(sys.modules), sorted(sys.modules)
assert seconds < 0.05, seconds
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in harness.__all__:
        assert getattr(harness, name).__name__ == name
    assert set(harness.__all__) <= set(dir(harness))
    with pytest.raises(AttributeError, match="no attribute 'Methods'"):
        harness.Methods  # noqa: B018


def test_run_has_the_arguments_and_defaults_of_a_request() -> None:
    parameters = inspect.signature(harness.run).parameters
    for field in fields(Request):
        default = None if field.default is MISSING else field.default
        assert parameters[field.name].default == default


def test_run_executes_a_cell_and_returns_its_result(colours: Path, tiny: Path, tmp_path: Path) -> None:
    options = ExecutionOptions(runs=tmp_path, tracking="off", device="cpu", workers=0)
    cell = {
        "method": "linear", "backbone": "resnet10t", "weights": "random", "dataset": str(colours), "head": "fpn:16",
        "budget": str(tiny), "settings": {"head_lr": 0.01},
    }  # fmt: skip
    result = harness.run(**cell, options=options)
    assert harness.run(**cell, options=options) == result
    store = harness.RunStore(tmp_path)
    (folder,) = store
    assert folder.read_result() == result
    assert result.spec.hyperparameters["head_lr"] == 0.01
    with pytest.raises(UserError, match=r"^method liner: no such method; did you mean linear\?"):
        harness.run(**{**cell, "method": "liner"}, options=options)
