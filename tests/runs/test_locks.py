"""One run, one process: on a disk that keeps locks to each machine, past stops of any length, and under any clock.

What cannot be had here (two machines, a wrong clock) is a small C library that is preloaded into real processes.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.launch.job import Job
from tests.support import warm_start
from tests.support.tiny_cell import environment, make_budget, run_arguments
from tests.support.tiny_jobs import SLOW, Cells, executions, folder, results_of, steps_done
from tests.support.warm_start import Started, Starter

LEASE = 3.0


class Machines(Starter):
    """Each process that it starts is a machine of its own while the file `apart` is in `told`."""

    def __init__(self, outputs: Path, library: Path, told: Path):
        self._outputs, self._count, self.told = outputs, 0, told
        self.environment = environment(LD_PRELOAD=str(library), INTERPOSE=str(told), HARNESS_LEASE=str(LEASE))
        self._process = subprocess.Popen(
            [sys.executable, warm_start.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def tell(self, *what: str) -> None:
        for file in self.told.iterdir():
            file.unlink()
        for name in what:
            (self.told / name).touch()


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("other machines and clocks need a C compiler and LD_PRELOAD")
    library = tmp_path_factory.mktemp("interpose") / "interpose.so"
    source = Path(warm_start.__file__).with_name("interpose.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    machines = Machines(tmp_path_factory.mktemp("outputs"), library, tmp_path_factory.mktemp("told"))
    yield machines
    machines.close()


@pytest.fixture
def machines(preloaded: Machines) -> Iterator[Machines]:
    preloaded.tell()
    yield preloaded
    preloaded.tell()


@pytest.fixture(scope="module")
def endless(longer_cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> Cells:
    budget = make_budget(tmp_path_factory.mktemp("budgets") / "endless.yaml", steps=400)
    return Cells(longer_cells.dataset, budget, longer_cells.plugin)


def run(machines: Machines, cells: Cells, job: Job) -> Started:
    more = ["--method", SLOW, "--plugin", cells.plugin, "--checkpoint-seconds", "0", "--quiet"]
    return machines(*run_arguments(cells.dataset, cells.budget, job.options.runs, *more))


def begun(machines: Machines, cells: Cells, job: Job) -> Started:
    """A started run that is some steps on its way."""
    started = run(machines, cells, job)
    started.wait_until(lambda: steps_done(job) > 3 or started.poll() is not None)
    assert started.poll() is None, started.stderr
    return started


@pytest.fixture(scope="module")
def undisturbed(
    preloaded: Machines, cells: Cells, longer_cells: Cells, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict]:
    """The results_of of the two cells that are disturbed below, by fingerprint."""
    runs = tmp_path_factory.mktemp("undisturbed")
    slow, tiny = longer_cells.job(runs, SLOW), cells.job(runs)
    started = [run(preloaded, longer_cells, slow), preloaded(*run_arguments(cells.dataset, cells.budget, runs))]
    assert [one.wait() for one in started] == [0, 0], [one.stderr for one in started]
    return {job.name: results_of(job) for job in (slow, tiny)}


def error(started: Started) -> str:
    """The one line that a command ended with."""
    (line,) = [line for line in started.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in started.stderr
    return line


def contents(job: Job) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder(job).path.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_run_of_another_machine_is_refused_while_that_one_lives_and_clocks_jump(
    machines: Machines, endless: Cells, tmp_path: Path
) -> None:
    machines.tell("apart", "clock")
    job = endless.job(tmp_path, SLOW)
    first = begun(machines, endless, job)
    second = run(machines, endless, job)
    code = second.wait()
    first.signal_group(signal.SIGTERM)
    assert code == 2 and second.stdout == ""
    assert f"{job.name} is being executed by process {first.pid} on machine-{first.pid};" in error(second)
    assert first.wait() == 130, first.stderr
    assert executions(job) == (1, 0)


def test_a_machine_that_stops_past_its_lease_is_taken_over_from_and_leaves_without_a_trace_when_it_wakes(
    machines: Machines, longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    machines.tell("apart")
    job = longer_cells.job(tmp_path, SLOW)
    first = begun(machines, longer_cells, job)
    first.signal_group(signal.SIGSTOP)
    second = run(machines, longer_cells, job)
    assert second.wait() == 0, second.stderr
    assert executions(job) == (2, 1)
    assert results_of(job) == undisturbed[job.name]
    before = contents(job)
    first.signal_group(signal.SIGCONT)
    assert first.wait() == 2, first.stderr
    assert f"{job.name} was taken over by another machine" in error(first)
    assert contents(job) == before


@pytest.mark.exhaustive
def test_a_machine_that_wakes_while_another_executes_its_run_leaves_it_to_that_one(
    machines: Machines, endless: Cells, tmp_path: Path
) -> None:
    machines.tell("apart")
    job = endless.job(tmp_path, SLOW)
    first = begun(machines, endless, job)
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
    assert folder(job).status().pid == second.pid
    steps = [point["step"] for point in folder(job).curve()]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(("apart",), marks=pytest.mark.exhaustive, id="on two machines"),
        pytest.param((), id="on one machine"),
    ],
)
def test_of_two_that_begin_a_run_at_once_one_executes(
    machines: Machines, cells: Cells, undisturbed: dict[str, dict], tmp_path: Path, where: tuple[str, ...]
) -> None:
    machines.tell(*where)
    job = cells.job(tmp_path)
    both = [machines(*run_arguments(cells.dataset, cells.budget, tmp_path)) for _ in range(2)]
    codes = sorted(started.wait() for started in both)
    # Where one was late by the whole of the other's run, it found the result.
    assert codes in ([0, 2], [0, 0]), [started.stderr for started in both]
    assert executions(job) == (1, 0)
    assert results_of(job) == undisturbed[job.name]


@pytest.mark.exhaustive
def test_on_one_machine_a_stop_of_any_length_loses_nothing(
    machines: Machines, longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    job = longer_cells.job(tmp_path, SLOW)
    first = begun(machines, longer_cells, job)
    first.signal_group(signal.SIGSTOP)
    time.sleep(1.5 * LEASE)
    second = run(machines, longer_cells, job)
    code = second.wait()
    first.signal_group(signal.SIGCONT)
    assert code == 2 and f"is being executed by process {first.pid} on " in error(second)
    assert first.wait() == 0, first.stderr
    assert executions(job) == (1, 0)
    assert results_of(job) == undisturbed[job.name]


@pytest.mark.exhaustive
def test_a_clock_that_jumps_changes_no_figure(
    machines: Machines, longer_cells: Cells, undisturbed: dict[str, dict], tmp_path: Path
) -> None:
    machines.tell("clock")
    job = longer_cells.job(tmp_path, SLOW)
    started = run(machines, longer_cells, job)
    assert started.wait() == 0, started.stderr
    assert results_of(job) == undisturbed[job.name]


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
    except (Claimed, ClaimLost):
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


@pytest.mark.parametrize("left", [None, b'{"machine": "gone/?", "pid": 1}\n000000000007\n'], ids=["new", "dead"])
def test_of_eight_machines_exactly_one_holds_a_claim_that_is_new_or_left_by_a_dead_one(
    machines: Machines, tmp_path: Path, left: bytes | None
) -> None:
    machines.tell("apart")
    if left is not None:
        (tmp_path / "x.lease").write_bytes(left)
    command = [sys.executable, "-c", CONTENDERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**machines.environment, "HARNESS_LEASE": "1"})
    assert (done.stdout.strip(), done.stderr) == ("1", "")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_is_preloaded_does_what_it_is_told(machines: Machines) -> None:
    code = (
        "import socket, time; print(socket.gethostname(), max(abs(time.time() - time.time()) for _ in range(9)) > 3000)"
    )

    def said() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env=machines.environment).stdout  # fmt: skip

    assert not said().startswith("machine-") and "False" in said()
    machines.tell("apart", "clock")
    assert re.fullmatch(r"machine-\d+ True\n", said())
