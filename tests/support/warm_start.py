"""`python -m harness` in a process of its own, without its imports each time: a process that has them forks.

Imports are nine tenths of a tiny run. A command started here has its own process group, signals and exit code, and
behaves as after a cold start. Run as a script, this file is the process that forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.tiny_cell import environment


class Started:
    """A started command: the leader of a process group of its own."""

    def __init__(self, starter: Starter, pid: int, outputs: Path):
        self.pid = pid
        self._starter, self._outputs, self._code = starter, outputs, None

    def poll(self) -> int | None:
        """The exit code as `subprocess` has it, or None while it runs."""
        if self._code is None:
            self._code = self._starter.ask({"poll": self.pid})
        return self._code

    def wait(self) -> int:
        return self.wait_until(lambda: False)

    def wait_until(self, reached: Callable[[], bool], seconds: float = 900) -> int | None:
        """Until `reached` or the end; the exit code, or None where it still runs."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None and not reached():
            assert time.monotonic() < end, f"waited for too long:\n{self.stderr}"
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        """`kill -9` of this process alone, and its end; its children have to notice by themselves."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def signal_group(self, number: int) -> None:
        """What a terminal does at Ctrl-C."""
        os.killpg(self.pid, number)

    @property
    def stdout(self) -> str:
        return self._outputs.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self._outputs.with_suffix(".err").read_text()


class Starter:
    """The process that has imported what a run needs. `outputs` is a folder for what the started ones print."""

    def __init__(self, outputs: Path):
        self._outputs, self._count = outputs, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm_start"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def __call__(self, *arguments: str | Path) -> Started:
        self._count += 1
        outputs = self._outputs / str(self._count)
        pid = self.ask({"start": list(map(str, arguments)), "outputs": str(outputs)})
        return Started(self, pid, outputs)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    import harness.cells.resolve
    import harness.cli.main
    import harness.engine.run
    import harness.tracking.mirror
    from harness.util.quiet import quiet_imports

    with quiet_imports():
        import mmseg.models.decode_heads
        import mmseg.models.necks  # noqa: F401
    while request := sys.stdin.readline():
        asked = json.loads(request)
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                os.setsid()
                _become(Path(asked["outputs"]))
                sys.argv = ["harness", *asked["start"]]
                return harness.cli.main.main()
        print(json.dumps(answer), flush=True)


def _become(outputs: Path) -> None:
    for descriptor, path in ((0, os.devnull), (1, outputs.with_suffix(".out")), (2, outputs.with_suffix(".err"))):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)


if __name__ == "__main__":
    _serve()
