"""Ctrl-C in a terminal reaches every process of its group; the server of forks is not ended by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.tiny_cell import environment

PRELOADED = """
import pathlib, time
pathlib.Path("began").touch()
time.sleep(0.5)
"""
CODE = """
import os, pathlib, signal, time
from harness.util.fork_server import fork_context
signal.signal(signal.SIGINT, lambda *_: None)
context = fork_context("preloaded")
while not pathlib.Path("began").exists():
    time.sleep(0.01)
os.killpg(0, signal.SIGINT)
process = context.Process(target=print, args=("forked",))
process.start()
process.join()
"""


def test_server_that_imports_is_spared_by_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "preloaded.py").write_text(PRELOADED)
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=environment(PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}"), start_new_session=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "forked\n", "")
