"""The GPU's command, rehearsed on a CPU: runs repeat, resume and share a process to the bit; steps are measured."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.test_benchmarks import rows_of
from tests.support.warm_start import Starter

MODULE = "benchmarks.gpu"


def _tables(text: str) -> list[list[dict[str, str]]]:
    return [rows_of(part) for part in text.split("### ")[1:]]


def test_rehearsal_of_runs_and_steps(start: Starter) -> None:
    done = start("--rehearse", "--only", "repeats,steps", module=MODULE)
    assert done.wait() == 0, done.stderr
    runs, steps = _tables(done.stdout)
    [run] = runs
    assert (run["repeated"], run["side by side"]) == ("equal", "equal")
    assert run["resumed"].startswith("equal (after step ") and run["resumed"] != "equal (after step 0)"
    assert [row["method"] for row in steps] == ["full", "spm"]
    assert all(0.3 < float(row["predicted"]) < 1.25 for row in steps)


@pytest.mark.exhaustive
def test_rehearsal_of_everything_else(start: Starter) -> None:
    done = start("--rehearse", "--only", "contract,precision,study,compiled", module=MODULE)
    assert done.wait() == 0, done.stderr
    contract, precision, study, compiled = _tables(done.stdout)
    assert [row["broken"] for row in contract] == ["0"]
    assert [row["mIoU, fp32"] for row in precision] == [row["mIoU, tf32"] for row in precision]
    assert [row["states"] for row in study] == ["6 done", "6 done"]
    assert len(compiled) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_rehearsal_is_named(start: Starter) -> None:
    done = start(module=MODULE)
    assert done.wait() == 2
    assert done.stderr == "error: no CUDA device is available; --rehearse executes the same on a CPU\n"
