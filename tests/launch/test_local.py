"""What a job of the local launcher gets of the machine."""

from __future__ import annotations

import pytest

from harness.engine.device import default_workers
from harness.errors import UserError
from harness.launch.local import Slot, make_slots


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_jobs_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert make_slots(None, "auto") == make_slots(1, "cpu") == [Slot("cpu")]
    assert make_slots(3, "auto") == [Slot("cpu", cores, 2) for cores in ((0, 1), (2, 3), (4, 5))]
    with pytest.raises(UserError, match="--jobs 9: there are only 8 cores"):
        make_slots(9, "cpu")


def test_jobs_on_gpus_share_the_threads_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of N jobs would start as many threads as there are cores."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert make_slots(None, "auto") == [Slot("cuda:0", threads=4), Slot("cuda:1", threads=4)]
    assert [slot.device for slot in make_slots(3, "cuda")] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {slot.threads for slot in make_slots(12, "auto")} == {1}
    assert make_slots(1, "cuda:1") == [Slot("cuda:1")]
    assert make_slots(4, "cuda:1") == [Slot("cuda:1", threads=2)] * 4


def test_a_lower_omp_num_threads_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [slot.threads for slot in make_slots(2, "cpu")] == [1, 1]


def test_loading_processes_follow_the_threads_of_a_job() -> None:
    assert [default_workers(threads) for threads in (None, 1, 4, 64)] == [4, 0, 2, 4]
