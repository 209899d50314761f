"""The feature store on small and full disks, shared by processes, and after kills."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from harness.features import store as feature_store
from harness.features.store import CHUNK, FeatureStore
from tests.support.feature_streams import IDENTITY, LARGE, bytes_used, file_size, files, fill, found

processes = multiprocessing.get_context("fork")  # as data loading does; to import torch takes seconds


# ---- room --------------------------------------------------------------------------------------------------------


def test_limit_of_zero_writes_and_finds_nothing(store: FeatureStore, folder: Path, tmp_path: Path) -> None:
    with FeatureStore(tmp_path / "nowhere", 0).stream(IDENTITY, 1) as stream:
        assert fill(stream, range(1)) == [False]
        assert stream.stopped == "the size limit is 0"
    with store.stream(IDENTITY, 1) as stream:
        assert found(stream, range(1)) == []  # and creates nothing
    assert not (tmp_path / "nowhere").exists() and not folder.exists()
    with store.stream(IDENTITY, 1) as stream:
        fill(stream, range(1))
    with FeatureStore(folder, 0).stream(IDENTITY, 1) as stream:
        assert not stream.has(0, ["0"])
        assert found(stream, range(1)) == []


def test_least_recently_used_files_are_evicted(folder: Path) -> None:
    size = file_size(folder)
    limit = int(5.5 * size)  # a file is expected to be a little larger than it becomes
    store = FeatureStore(folder, limit)
    (folder / "of another version").parent.mkdir()
    (folder / "of another version").write_bytes(bytes(size))
    os.utime(folder / "of another version", (0, 0))
    for number in range(4):
        with store.stream({"number": number}, CHUNK) as stream:
            fill(stream, range(CHUNK), salt=number)
        (path,) = (path for path in files(folder) if path.stat().st_mtime > 100)
        os.utime(path, (number + 1, number + 1))
    with store.stream({"number": 0}, CHUNK) as stream:
        assert found(stream, range(3), salt=0) == [0, 1, 2]
    cached = []
    for number in range(4, 7):
        with store.stream({"number": number}, CHUNK) as stream:
            assert all(fill(stream, range(CHUNK), salt=number))
        cached.append([n for n in range(4) if any(path.stat().st_mtime == n + 1 for path in files(folder))])
    assert cached == [[1, 2, 3], [2, 3], [3]]  # 0 was used, and the foreign file was the oldest
    assert bytes_used(folder) <= limit
    with store.stream({"number": 0}, CHUNK) as stream:
        assert found(stream, range(CHUNK), salt=0) == list(range(CHUNK))


def test_stream_does_not_evict_itself(folder: Path) -> None:
    store = FeatureStore(folder, int(2.9 * file_size(folder)))
    with store.stream({"number": 0}, CHUNK) as other:
        fill(other, range(CHUNK))
    with store.stream({"number": 1}, 5 * CHUNK) as stream:
        written = fill(stream, range(5 * CHUNK))
        assert sum(written) == 3 * CHUNK - 1
        assert "no space left" in (stream.stopped or "")
        assert found(stream, range(5 * CHUNK)) == list(range(2 * CHUNK))
    with store.stream({"number": 0}, CHUNK) as other:
        assert found(other, range(CHUNK)) == [], "it was older"


def test_tensor_over_the_limit_evicts_nothing(folder: Path) -> None:
    store = FeatureStore(folder, 3 * file_size(folder))
    with store.stream({"number": 0}, CHUNK) as small, store.stream({"number": 1}, CHUNK) as large:
        fill(small, range(CHUNK))
        assert not fill(large, range(CHUNK), size=1024)[-1]
        assert found(small, range(CHUNK)) == list(range(CHUNK))


def test_evicted_file_stays_readable_while_open(folder: Path) -> None:
    store = FeatureStore(folder, int(1.9 * file_size(folder)))
    with store.stream({"number": 0}, CHUNK) as evicted, store.stream({"number": 1}, CHUNK) as stream:
        fill(evicted, range(CHUNK))
        assert found(evicted, range(1)) == [0]
        fill(stream, range(CHUNK), salt=1)
        assert len(files(folder)) == 1
        assert found(evicted, range(CHUNK)) == list(range(CHUNK))
    with store.stream({"number": 0}, CHUNK) as evicted:
        assert found(evicted, range(CHUNK)) == []


def test_full_disk_stops_writing_only(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(small_disk / "features", LARGE)
    with store.stream(IDENTITY, 3 * CHUNK) as stream:
        assert all(fill(stream, range(CHUNK), size=1024))
        free = shutil.disk_usage(small_disk).free
        monkeypatch.setattr(feature_store, "_free", lambda folder: float(LARGE))  # others fill the disk meanwhile
        assert not fill(stream, range(CHUNK, 2 * CHUNK), size=1 << 17)[-1]
        assert os.strerror(errno.ENOSPC).lower() in (stream.stopped or "").lower()
        assert shutil.disk_usage(small_disk).free == free
        assert not any(fill(stream, range(2 * CHUNK), size=1024))
        assert found(stream, range(2 * CHUNK), size=1024) == list(range(CHUNK))


def test_reserved_disk_space_stays_free(small_disk: Path) -> None:
    with FeatureStore(small_disk / "features", LARGE).stream(IDENTITY, 100 * CHUNK) as stream:
        written = fill(stream, range(100 * CHUNK), size=2048)
        assert "no space left" in (stream.stopped or "")
        assert found(stream, range(100 * CHUNK), size=2048) == list(range(sum(written) // CHUNK * CHUNK))
    disk = shutil.disk_usage(small_disk)
    assert disk.total / 20 <= disk.free < disk.total / 4


@pytest.mark.parametrize("name", ["file", "file/features"])
def test_folder_that_cannot_be_written_stops_writing_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with FeatureStore(tmp_path / name, LARGE).stream(IDENTITY, 1) as stream:
        assert found(stream, range(1)) == []
        assert fill(stream, range(1)) == [False]
        assert stream.stopped


def test_failed_write_leaves_no_file(store: FeatureStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error")

    monkeypatch.setattr(feature_store, "save_file", fail)
    with store.stream(IDENTITY, 1) as stream:
        assert fill(stream, range(1)) == [False]
        assert stream.stopped == "I/O error"
    assert files(folder) == []


# ---- processes ---------------------------------------------------------------------------------------------------


def test_nothing_is_written_without_the_lock(
    store: FeatureStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "_LOCK_TIMEOUT", 0.0)
    folder.mkdir()
    with FileLock(folder / ".lock"), store.stream(IDENTITY, CHUNK) as stream:
        assert not fill(stream, range(CHUNK))[-1]
        assert ".lock" in (stream.stopped or "")
    assert files(folder) == []


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[Any, Connection]]]:
    """Starts a process and returns it with the pipe that it reports through; kills it in the end."""
    begun = []

    def start(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        begun.append(process)
        return process, ours

    yield start
    for process in begun:
        process.kill()
        process.join()


def use(report: Connection, folder: Path, limit: int, seed: int, rounds: int) -> None:
    """Read what is cached of streams that others use as well, and write the rest: (passes read, passes written)."""
    chance = random.Random(seed)
    store = FeatureStore(folder, limit)
    hits = misses = 0
    for _ in range(rounds):
        number = chance.randrange(3)
        with store.stream({"number": number}, 3 * CHUNK) as stream:
            for index in range(chance.choice([0, 0, 5]), 3 * CHUNK):
                if found(stream, range(index, index + 1), size=1024, salt=number):
                    hits += 1
                else:
                    misses += 1
                    fill(stream, range(index, index + 1), size=1024, salt=number)
    report.send((hits, misses))


def test_processes_share_a_folder_within_the_limit(
    folder: Path, started: Callable[..., tuple[Any, Connection]]
) -> None:
    limit = int(4.9 * file_size(folder, size=1024))  # of the nine files that the three streams would take
    begun = [started(use, folder, limit, seed, 10) for seed in range(3)]
    counts = []
    for process, pipe in begun:
        counts.append(pipe.recv())  # EOFError if the process failed
        process.join()
        assert process.exitcode == 0
    assert min(hits for hits, _ in counts) > 0, counts
    assert sum(misses for _, misses in counts) > 9 * CHUNK, counts  # more than to write each once: some were evicted
    assert 0 < bytes_used(folder) <= limit
    assert all(path.suffix == ".safetensors" for path in files(folder))


def write_half(report: Connection, folder: Path) -> None:
    """Write two files, and hang in the middle of the third."""

    def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if "32" in tensors:
            path.write_bytes(b"half")
            report.send("half")
            time.sleep(600)
        save_file(tensors, path, metadata)

    mock.patch.object(feature_store, "save_file", save).start()
    with FeatureStore(folder, LARGE).stream(IDENTITY, 3 * CHUNK) as stream:
        fill(stream, range(3 * CHUNK))


def test_killed_writer_leaves_whole_files_and_no_draft(
    store: FeatureStore, folder: Path, started: Callable[..., tuple[Any, Connection]]
) -> None:
    process, pipe = started(write_half, folder)
    assert pipe.recv() == "half"
    process.kill()
    process.join()
    assert [path.suffix for path in files(folder)] == [".safetensors", ".safetensors", ".tmp"]
    with store.stream(IDENTITY, 3 * CHUNK) as stream:
        assert found(stream, range(3 * CHUNK)) == list(range(2 * CHUNK))
        fill(stream, range(2 * CHUNK, 3 * CHUNK))
        assert found(stream, range(3 * CHUNK)) == list(range(3 * CHUNK))
    assert [path.suffix for path in files(folder)] == [".safetensors"] * 3
