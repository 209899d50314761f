"""Commands in this process, for tests of what they do and print and not of how they start."""

from __future__ import annotations

import contextlib
import io
import signal
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from harness.cli import main
from tests.support import step_costs
from tests.support.tiny_cell import run_arguments

torch.set_num_threads(1)  # the networks are tiny, and other tests need the cores


@dataclass(frozen=True)
class CommandOutput:
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str


def call(*arguments: str | Path) -> CommandOutput:
    """`harness ARGUMENTS`. An exception that the command does not handle fails the test."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        mock.patch("sys.argv", ["harness", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return CommandOutput(code, out.getvalue(), err.getvalue())


def train(dataset: Path, budget: Path, runs: Path, *more: str | Path) -> Path:
    """The folder of a finished run of the tiny cell; `more` as for `run_arguments`."""
    step_costs.lend(runs)
    output = call(*run_arguments(dataset, budget, runs, *more))
    assert output.code == 0, output.err
    step_costs.keep(runs)
    return Path(output.out.splitlines()[-1])


def refusal(*arguments: str | Path) -> str:
    """The one line of a command that ends with an error of the user: exit 2, nothing on stdout, no traceback."""
    output = call(*arguments)
    assert (output.code, output.out) == (2, ""), output
    (line,) = output.err.splitlines()
    assert line.startswith("error: "), line
    return line.removeprefix("error: ")


def runs_in(folder: Path) -> list[str]:
    """The run folders in a `--runs` folder: everything but caches and locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []
