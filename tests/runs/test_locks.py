"""One run, one process: on disks that keep locks to each machine, after stalls of any length, and under any clock.

Several machines and wrong clocks are simulated by a small C library that is preloaded into real processes.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.launch.job import Job
from harness.runs import locks
from harness.runs.locks import AlreadyLocked, lock, lock_owner
from tests.support import warm_start
from tests.support.tiny_cell import make_budget, run_arguments
from tests.support.tiny_jobs import PLUGIN, SLOW, Cells, executions, folder, loaded, results_of, steps_done
from tests.support.warm_start import Started, Starter

LEASE = 3.0


class Machines(Starter):
    """Each process that it starts is a machine of its own while the file `apart` is in the folder `switches`."""

    def __init__(self, outputs: Path, library: Path, switches: Path):
        self.switches = switches
        variables = {"LD_PRELOAD": str(library), "INTERPOSE": str(switches), "HARNESS_LEASE": str(LEASE)}
        super().__init__(outputs, outputs / "starter", **variables)

    def switch_on(self, *names: str) -> None:
        for file in self.switches.iterdir():
            file.unlink()
        for name in names:
            (self.switches / name).touch()


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("other machines and clocks need a C compiler and LD_PRELOAD")
    library = tmp_path_factory.mktemp("interpose") / "interpose.so"
    source = Path(warm_start.__file__).with_name("interpose.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    machines = Machines(tmp_path_factory.mktemp("outputs"), library, tmp_path_factory.mktemp("switches"))
    yield machines
    machines.close()


@pytest.fixture
def machines(preloaded: Machines) -> Iterator[Machines]:
    preloaded.switch_on()
    yield preloaded
    preloaded.switch_on()


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("plugins") / "troublesome.py"
    path.write_text(PLUGIN, encoding="utf-8")
    with loaded(path):
        yield path


def cells_of(colours: Path, plugin: Path, folder: Path, steps: int) -> Cells:
    return Cells(colours, make_budget(folder / "budget.yaml", steps=steps), plugin)


@pytest.fixture(scope="module")
def cells(colours: Path, plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return cells_of(colours, plugin, tmp_path_factory.mktemp("tiny"), 12)


@pytest.fixture(scope="module")
def longer_cells(colours: Path, plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return cells_of(colours, plugin, tmp_path_factory.mktemp("longer"), 25)


@pytest.fixture(scope="module")
def endless(colours: Path, plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return cells_of(colours, plugin, tmp_path_factory.mktemp("endless"), 400)


def run(machines: Machines, cells: Cells, job: Job) -> Started:
    more: list[str | Path] = ["--method", SLOW, "--plugin", cells.plugin, "--checkpoint-seconds", "0", "--quiet"]
    return machines(*run_arguments(cells.dataset, cells.budget, job.options.runs, *more))


def running(machines: Machines, cells: Cells, job: Job) -> Started:
    """A run that has done some steps."""
    started = run(machines, cells, job)
    started.wait_until(lambda: steps_done(job) > 3 or started.poll() is not None)
    assert started.poll() is None, started.stderr
    return started


@pytest.fixture(scope="module")
def expected(
    preloaded: Machines, cells: Cells, longer_cells: Cells, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict]:
    """Results of the two cells, by fingerprint, when nothing goes wrong."""
    runs = tmp_path_factory.mktemp("expected")
    slow, tiny = longer_cells.job(runs, SLOW), cells.job(runs)
    started = [run(preloaded, longer_cells, slow), preloaded(*run_arguments(cells.dataset, cells.budget, runs))]
    assert [one.wait() for one in started] == [0, 0], [one.stderr for one in started]
    return {job.name: results_of(job) for job in (slow, tiny)}


def error(started: Started) -> str:
    """The one error line that a command ended with."""
    (line,) = [line for line in started.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in started.stderr
    return line


def contents(job: Job) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder(job).path.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_live_run_of_another_machine_is_refused_despite_clock_jumps(
    machines: Machines, endless: Cells, tmp_path: Path
) -> None:
    machines.switch_on("apart", "clock")
    job = endless.job(tmp_path, SLOW)
    first = running(machines, endless, job)
    second = run(machines, endless, job)
    code = second.wait()
    first.signal_group(signal.SIGTERM)
    assert code == 2 and second.stdout == ""
    assert f"{job.name} is being executed by process {first.pid} on machine-{first.pid};" in error(second)
    assert first.wait() == 130, first.stderr
    assert executions(job) == (1, 0)


def test_stalled_process_loses_lease_and_writes_nothing(
    machines: Machines, longer_cells: Cells, expected: dict[str, dict], tmp_path: Path
) -> None:
    machines.switch_on("apart")
    job = longer_cells.job(tmp_path, SLOW)
    first = running(machines, longer_cells, job)
    first.signal_group(signal.SIGSTOP)
    second = run(machines, longer_cells, job)
    assert second.wait() == 0, second.stderr
    assert executions(job) == (2, 1)
    assert results_of(job) == expected[job.name]
    before = contents(job)
    first.signal_group(signal.SIGCONT)
    assert first.wait() == 2, first.stderr
    assert f"{job.name} was taken over by another machine" in error(first)
    assert contents(job) == before


@pytest.mark.exhaustive
def test_stalled_process_leaves_its_run_to_the_new_owner(machines: Machines, endless: Cells, tmp_path: Path) -> None:
    machines.switch_on("apart")
    job = endless.job(tmp_path, SLOW)
    first = running(machines, endless, job)
    first.signal_group(signal.SIGSTOP)
    before = steps_done(job)
    second = run(machines, endless, job)
    second.wait_until(lambda: steps_done(job) > before)
    first.signal_group(signal.SIGCONT)
    assert first.wait() == 2, first.stderr
    then = steps_done(job)
    second.wait_until(lambda: steps_done(job) > then)
    assert second.poll() is None
    second.signal_group(signal.SIGTERM)
    assert second.wait() == 130
    status = folder(job).status()
    assert status is not None and status.pid == second.pid
    steps = [point["step"] for point in folder(job).curve()]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(("apart",), marks=pytest.mark.exhaustive, id="on two machines"),
        pytest.param((), id="on one machine"),
    ],
)
def test_only_one_of_two_simultaneous_commands_executes(
    machines: Machines, cells: Cells, expected: dict[str, dict], tmp_path: Path, where: tuple[str, ...]
) -> None:
    machines.switch_on(*where)
    job = cells.job(tmp_path)
    both = [machines(*run_arguments(cells.dataset, cells.budget, tmp_path)) for _ in range(2)]
    codes = sorted(started.wait() for started in both)
    # If one started after the other had finished, it found the result.
    assert codes in ([0, 2], [0, 0]), [started.stderr for started in both]
    assert executions(job) == (1, 0)
    assert results_of(job) == expected[job.name]


@pytest.mark.exhaustive
def test_stalled_process_keeps_its_run_on_one_machine(
    machines: Machines, longer_cells: Cells, expected: dict[str, dict], tmp_path: Path
) -> None:
    job = longer_cells.job(tmp_path, SLOW)
    first = running(machines, longer_cells, job)
    first.signal_group(signal.SIGSTOP)
    time.sleep(1.5 * LEASE)
    second = run(machines, longer_cells, job)
    code = second.wait()
    first.signal_group(signal.SIGCONT)
    assert code == 2 and f"is being executed by process {first.pid} on " in error(second)
    assert first.wait() == 0, first.stderr
    assert executions(job) == (1, 0)
    assert results_of(job) == expected[job.name]


@pytest.mark.exhaustive
def test_clock_jumps_change_no_result(
    machines: Machines, longer_cells: Cells, expected: dict[str, dict], tmp_path: Path
) -> None:
    machines.switch_on("clock")
    job = longer_cells.job(tmp_path, SLOW)
    started = run(machines, longer_cells, job)
    assert started.wait() == 0, started.stderr
    assert results_of(job) == expected[job.name]


CONTENDERS = """
import os, sys, time
from pathlib import Path
from harness.runs.locks import AlreadyLocked, LockLost, lock

def contend():
    try:
        with lock(Path(sys.argv[1]), "x") as held:
            time.sleep(2)
            held.check()
            return 1
    except (AlreadyLocked, LockLost):
        return 0

ready, begin = os.pipe()
contenders = []
for _ in range(8):
    pid = os.fork()
    if not pid:
        os.close(begin)
        os.read(ready, 1)
        os._exit(contend())
    contenders.append(pid)
os.close(begin)
print(sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in contenders))
"""


@pytest.mark.parametrize(
    "left", [None, b'{"machine": "gone/?", "pid": 1}\n000000000007\n'], ids=["new", "left by a dead one"]
)
def test_one_of_eight_machines_gets_the_lock(machines: Machines, tmp_path: Path, left: bytes | None) -> None:
    machines.switch_on("apart")
    if left is not None:
        (tmp_path / "x.lease").write_bytes(left)
    command = [sys.executable, "-c", CONTENDERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**machines.environment, "HARNESS_LEASE": "1"})
    assert (done.stdout.strip(), done.stderr) == ("1", "")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_interposed_library_acts_on_request(machines: Machines) -> None:
    code = (
        "import socket, time; print(socket.gethostname(), max(abs(time.time() - time.time()) for _ in range(9)) > 3000)"
    )

    def printed() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env=machines.environment).stdout  # fmt: skip

    assert not printed().startswith("machine-") and "False" in printed()
    machines.switch_on("apart", "clock")
    assert re.fullmatch(r"machine-\d+ True\n", printed())


# ---- one machine ---------------------------------------------------------------------------------------------------


def hold(folder: Path, started: Event) -> None:
    with lock(folder, "x"):
        started.set()
        time.sleep(600)


def test_killed_process_frees_its_lock_at_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    owner = fork.Process(target=hold, args=(tmp_path, started), daemon=True)
    owner.start()
    assert started.wait(60)
    assert f"process {owner.pid} on " in (lock_owner(tmp_path, "x") or "")
    with pytest.raises(AlreadyLocked, match=f"executed by process {owner.pid} on "), lock(tmp_path, "x"):
        pass
    owner.kill()
    owner.join()
    assert lock_owner(tmp_path, "x") is None
    with lock(tmp_path, "x") as held:
        held.check()
    assert lock_owner(tmp_path, "x") is None


def test_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    with lock(tmp_path, "x"):
        child.start()
    try:
        with lock(tmp_path, "x") as held:
            held.check()
    finally:
        child.kill()
        child.join()


def test_lock_whose_thread_cannot_be_started_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", no_thread)
        with pytest.raises(RuntimeError, match="new thread"), lock(tmp_path, "a"):
            pass
    assert lock_owner(tmp_path, "a") is None
    with lock(tmp_path, "a"):
        assert lock_owner(tmp_path, "a") is not None


def test_disk_without_locks_relies_on_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, blocking: bool) -> bool:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setenv("HARNESS_LEASE", "0.5")
    monkeypatch.setattr(locks, "lock_descriptor", fail)
    with lock(tmp_path, "x") as held:
        with pytest.raises(AlreadyLocked), lock(tmp_path, "x"):
            pass
        held.check()


def test_leftovers_are_removed_by_the_next_lock(tmp_path: Path) -> None:
    def leave(name: str, content: str, days: int) -> None:
        (tmp_path / name).write_text(content)
        then = time.time() - days * 24 * 3600
        os.utime(tmp_path / name, (then, then))

    def lease(machine: str) -> str:
        return json.dumps({"id": "0", "machine": machine, "pid": 1}) + "\n000000000001\n"

    leave("dead.lease", lease(locks._machine()), days=0)
    leave("away.lease", lease("elsewhere/0"), days=1)
    leave("gone.lease", lease("elsewhere/0"), days=8)
    leave("recent", "", days=1)
    leave("old", "", days=8)
    leave("x.lease.0123.tmp", "", days=8)
    leave("y.lease.0123.tmp", "", days=0)
    with lock(tmp_path, "x") as held:
        held.check()
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {"x", "x.lease", "dead", "gone", "away", "away.lease", "recent", "y.lease.0123.tmp"}
    assert lock_owner(tmp_path, "away") == "process 1 on elsewhere"


@pytest.mark.parametrize("value", ["soon", "0", "-3", "nan", "inf", ""])
def test_invalid_lease_duration_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HARNESS_LEASE", value)
    with pytest.raises(UserError, match=f"^HARNESS_LEASE={value}: not a positive number"), lock(tmp_path, "x"):
        pass
    assert list(tmp_path.iterdir()) == []
