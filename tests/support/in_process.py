"""The command in this process, where a test is about what it says and not about how it starts."""

from __future__ import annotations

import contextlib
import io
import signal
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from harness.cli import main

torch.set_num_threads(1)  # for networks this small; the cores have other tests to run


@dataclass(frozen=True)
class Said:
    """What a command left: its exit code, and what it wrote where."""

    code: int
    out: str
    err: str


def call(*arguments: str | Path) -> Said:
    """`harness ARGUMENTS`. An exception that the command does not answer itself is the test's failure."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = signal.getsignal(signal.SIGTERM)
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
            signal.signal(signal.SIGTERM, before)
    return Said(code, out.getvalue(), err.getvalue())


def refusal(*arguments: str | Path) -> str:
    """The one line of a command that is refused as the user's to mend: exit 2, nothing on stdout, no traceback."""
    said = call(*arguments)
    assert (said.code, said.out) == (2, ""), said
    (line,) = said.err.splitlines()
    assert line.startswith("error: "), line
    return line.removeprefix("error: ")


def runs_in(folder: Path) -> list[str]:
    """What lies in a `--runs` folder besides caches and locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []
