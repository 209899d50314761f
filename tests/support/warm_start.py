"""A command such as `harness` in a process of its own, without its imports: a process that has them forks.

Imports are nine tenths of a tiny run. A command started here has its own process group, signals, environment and exit
code, and behaves as after a cold start; so does the server from which it forks its jobs. One process forks for all
workers of a test session, until the last has closed its connection. Run as a script, this file is that process.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection, forkserver, util
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests.support import step_costs
from tests.support.tiny_cell import environment

LONGEST = 2**16
"""Bytes of a message."""


class Started:
    """A started command: the leader of a process group of its own."""

    def __init__(self, starter: Starter, pid: int, outputs: Path, runs: Path | None):
        self.pid = pid
        self._starter, self._outputs, self._runs, self._code = starter, outputs, runs, None

    def poll(self) -> int | None:
        """The exit code as `subprocess` has it, or None while it runs."""
        if self._code is None:
            self._code = self._starter.ask({"poll": self.pid})
            if self._code is not None and self._runs is not None:
                step_costs.keep(self._runs)
        return self._code

    def wait(self) -> int:
        return self.wait_until(lambda: False)

    def wait_until(self, reached: Callable[[], bool], seconds: float = 900) -> int | None:
        """Until `reached` or the end; the exit code, or None where it still runs."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None and not reached():
            assert time.monotonic() < end, f"waited for too long:\n{self.stderr}"
            time.sleep(0.005)
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
    """The connection to the process that has imported what a run needs.

    `outputs`: a folder for what the started ones print. `place`: where that process listens; it is started where there
    is none. `variables`: the environment of one that is started, over the usual.
    """

    def __init__(self, outputs: Path, place: Path, **variables: str):
        self._outputs, self._count = outputs, 0
        self.environment = environment(**variables)
        with FileLock(f"{place}.lock"):
            self._socket = _connect(place) or self._start(place)

    def __call__(
        self, *arguments: str | Path, module: str = "harness", terminal: int | None = None, **variables: str
    ) -> Started:
        """`python -m MODULE ARGUMENTS`. `terminal`: its stderr. `variables`: of its environment, over those there."""
        self._count += 1
        outputs = self._outputs / str(self._count)
        runs = Path(arguments[arguments.index("--runs") + 1]) if "--runs" in arguments else None
        if runs is not None and not (runs / ".cache").exists():  # nothing is written beside finished runs
            step_costs.lend(runs)
        asked = {"module": module, "start": list(map(str, arguments)), "outputs": str(outputs), "variables": variables}
        return Started(self, self.ask(asked, [] if terminal is None else [terminal]), outputs, runs)

    def ask(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> Any:
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        return json.loads(self._socket.recv(LONGEST))

    def close(self) -> None:
        self._socket.close()

    def _start(self, place: Path) -> socket.socket:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(place))
            listener.listen()
            number = str(listener.fileno())
            command = [sys.executable, "-m", "tests.support.warm_start", number, str(place)]
            subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()])
            connected = _connect(place)
        assert connected is not None
        return connected


def _connect(place: Path) -> socket.socket | None:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        client.connect(str(place))
    except (FileNotFoundError, ConnectionRefusedError):
        client.close()
        place.unlink(missing_ok=True)
        return None
    return client


def _serve(listener: socket.socket, place: Path) -> None:
    import harness.__main__
    import harness.cli.main
    import harness.launch.preload  # noqa: F401
    import studies.compare
    import studies.search.search  # noqa: F401

    gc.freeze()
    clients: list[socket.socket] = []
    while True:
        for ready in connection.wait([listener, *clients]):
            if ready is listener:
                clients.append(listener.accept()[0])
                continue
            request, descriptors, _, _ = socket.recv_fds(ready, LONGEST, 1)
            if request:
                asked = json.loads(request)
                if "poll" in asked:
                    pid, status = os.waitpid(asked["poll"], os.WNOHANG)
                    answer = os.waitstatus_to_exitcode(status) if pid else None
                elif not (answer := os.fork()):
                    for other in (listener, *clients):
                        other.close()
                    return _become(asked, *descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
                ready.send(json.dumps(answer).encode())
            else:
                clients.remove(ready)
                ready.close()
                if not clients:
                    place.unlink(missing_ok=True)
                    if not connection.wait([listener], 0):
                        return None


def _become(asked: dict[str, Any], terminal: int | None = None) -> object:
    """Execute the command in this new process."""
    import harness.__main__

    os.setsid()
    outputs = Path(asked["outputs"])
    for descriptor, path in enumerate((os.devnull, outputs.with_suffix(".out"), outputs.with_suffix(".err"))):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    if terminal is not None:
        os.dup2(terminal, 2)
        os.close(terminal)
    os.environ.update(asked["variables"])
    sys.argv = [asked["module"], *asked["start"]]
    fork_the_fork_server()
    if asked["module"] != "harness":
        return runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    sys.modules["__main__"] = harness.__main__
    harness.__main__.main()


def fork_the_fork_server() -> None:
    """Have `multiprocessing` fork its server of forks from this process, which has imported what the server needs.

    A cold start takes six seconds. To be started early: it keeps what this process is when it forks. Its jobs cannot
    use a GPU if this process has asked for one.
    """
    util.spawnv_passfds = _fork_server


def _fork_server(path: bytes, arguments: list[str], passed: Iterable[int], *, spawn: Any = util.spawnv_passfds) -> int:
    """The process that `multiprocessing` would start with a command line, forked where it is the server of forks."""
    command = arguments[-1]
    if not command.startswith("from multiprocessing.forkserver import main"):
        return spawn(path, arguments, passed)
    if pid := os.fork():
        return pid
    code = 1
    faulthandler.disable()  # pytest's writes to a descriptor that is closed here
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest's have files of their own, which are closed here
    vars(forkserver._forkserver).update(vars(forkserver.ForkServer()))  # a new one: this one's lock is held
    try:
        kept = [2, *sorted(passed), os.sysconf("SC_OPEN_MAX")]
        for lower, upper in itertools.pairwise(kept):
            if lower + 1 < upper:
                os.closerange(lower + 1, upper)
        exec(command, {})
    except SystemExit:
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
