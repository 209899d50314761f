"""The store of frozen features: what is found is what was written, whatever happened to files, disk and processes."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.features import store as feature_store
from harness.features.store import CHUNK, FeatureStore, FeatureStream

MIB = 1 << 20
PLENTY = 1 << 30
ONE = {"backbone": "resnet10t"}

processes = multiprocessing.get_context("fork")  # as data loading does; to import torch takes seconds


def feature(index: int, name: str = "0", size: int = 256, salt: int = 0) -> Tensor:
    """What a pass puts out under a name: float32 [size], another one for each pass, name and salt."""
    generator = torch.Generator().manual_seed(hash((index, int(name), salt)))
    return torch.rand(size, generator=generator)


def fill(stream: FeatureStream, passes: range, name: str = "0", size: int = 256, salt: int = 0) -> list[bool]:
    return [stream.write(index, {name: (feature(index, name, size, salt), 0.5)}) for index in passes]


def found(stream: FeatureStream, passes: range, name: str = "0", size: int = 256, salt: int = 0) -> list[int]:
    """The passes that are there. One that is there with anything but its own tensor is the test's failure."""
    indices = []
    for index in passes:
        kept = stream.read(index, [name])
        if kept is not None:
            assert torch.equal(kept[name].tensor, feature(index, name, size, salt)), f"pass {index} is not what it was"
            indices.append(index)
    return indices


def files(folder: Path) -> list[Path]:
    """What lies there besides the lock."""
    return sorted(path for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def file_size(folder: Path, size: int = 256) -> int:
    """Bytes that one whole file of `feature`s takes."""
    store = FeatureStore(folder, PLENTY)
    with store.stream(ONE, CHUNK) as stream:
        fill(stream, range(CHUNK), size=size)
    used = store.bytes_used()
    shutil.rmtree(folder)
    return used


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "features", PLENTY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "features"


# What is written is found


def _of(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 200, shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda t: _of(t, 3, 5, 7, 9), id="odd"),
        pytest.param(lambda t: _of(t, 2, 6, 4, 5).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda t: _of(t, 2, 6, 3, 4, 5).permute(0, 4, 2, 1, 3), id="permuted"),
        pytest.param(lambda t: _of(t, 4, 1, 3, 1).to(memory_format=torch.channels_last), id="single"),
        pytest.param(lambda t: torch.empty_strided((1, 3), (77, 1), dtype=t).copy_(_of(t, 1, 3)), id="wide_single"),
        pytest.param(lambda t: _of(t, 0, 3, 4, 4).to(memory_format=torch.channels_last), id="empty"),
        pytest.param(lambda t: _of(t), id="scalar"),
        pytest.param(lambda t: _of(t, 100)[7:42], id="offset"),
    ],
)
def test_a_dense_tensor_comes_back_with_its_dtype_shape_and_strides(
    store: FeatureStore, make: Callable[[torch.dtype], Tensor], dtype: torch.dtype
) -> None:
    tensors = [make(dtype), make(dtype)]
    with store.stream(ONE, 2) as stream:
        for index, tensor in enumerate(tensors):
            assert stream.write(index, {"map": (tensor, index / 3)})
    with store.stream(ONE, 2) as stream:
        for index, tensor in enumerate(tensors):
            kept = stream.read(index, ["map"])["map"]
            assert (kept.tensor.dtype, kept.tensor.shape) == (tensor.dtype, tensor.shape)
            assert kept.tensor.stride() == tensor.stride()
            assert torch.equal(kept.tensor, tensor)
            assert kept.seconds == index / 3


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.rand(4, 6)[:, ::2], id="gaps"),
        pytest.param(torch.rand(4, 1).expand(4, 5), id="shared"),
        pytest.param(torch.rand(20).as_strided((4, 6), (2, 1)), id="overlapping"),
    ],
)
def test_a_tensor_that_is_not_dense_comes_back_contiguous(store: FeatureStore, tensor: Tensor) -> None:
    with store.stream(ONE, 1) as stream:
        stream.write(0, {"map": (tensor, 0.0)})
        kept = stream.read(0, ["map"])["map"].tensor
    assert kept.is_contiguous()
    assert torch.equal(kept, tensor)


def test_values_come_back_to_the_bit_and_without_a_graph(store: FeatureStore) -> None:
    strange = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45], requires_grad=True)
    with torch.inference_mode():
        inferred = torch.ones(3) * 2
    with store.stream(ONE, 1) as stream:
        stream.write(0, {"strange": (strange, 0.0), "inferred": (inferred, 0.0)})
        kept = stream.read(0, ["strange", "inferred"])
    assert not kept["strange"].tensor.requires_grad
    assert torch.equal(kept["strange"].tensor.view(torch.int32), strange.detach().view(torch.int32))
    assert torch.equal(kept["inferred"].tensor, inferred)
    weight = torch.ones(3, requires_grad=True)
    (weight * kept["inferred"].tensor).sum().backward()  # a tensor like any other, where it was read outside of that


def test_any_name_is_a_name(store: FeatureStore) -> None:
    names = ["stages.0", "../stem", "a/b", "ä ö", ".hidden", "map.features", ""]
    with store.stream(ONE, 1) as stream:
        assert stream.write(0, {name: (torch.tensor(number), 0.0) for number, name in enumerate(names)})
        kept = stream.read(0, names)
    assert [kept[name].tensor.item() for name in names] == list(range(len(names)))


def test_nothing_is_found_under_another_identity(store: FeatureStore) -> None:
    with store.stream({"weights": "a", "crop": [64, 64]}, 1) as stream:
        fill(stream, range(1))
    with store.stream({"crop": [64, 64], "weights": "a"}, 1) as same, store.stream({"weights": "b"}, 1) as other:
        assert found(same, range(1)) == [0]
        assert not other.has(0, ["0"])
        assert found(other, range(1)) == []


def test_what_a_reader_writes_into_a_tensor_is_its_own(store: FeatureStore) -> None:
    with store.stream(ONE, 1) as stream:
        fill(stream, range(1))
        stream.read(0, ["0"])["0"].tensor.zero_()
        assert found(stream, range(1)) == [0]


def test_pass_by_pass_until_a_partial_last_file(store: FeatureStore, folder: Path) -> None:
    passes = 2 * CHUNK + 3
    with store.stream(ONE, passes) as stream:
        for index in range(passes):
            assert fill(stream, range(index, index + 1)) == [True]
            whole = index + 1 if index == passes - 1 else (index + 1) // CHUNK * CHUNK
            assert stream.has(index, ["0"]) == (index < whole)
            assert found(stream, range(passes)) == list(range(whole))
    assert len(files(folder)) == 3
    assert store.bytes_used() == sum(path.stat().st_size for path in files(folder))


def test_a_stream_that_begins_in_the_middle_keeps_from_the_next_file_on(store: FeatureStore) -> None:
    passes = range(3 * CHUNK)
    with store.stream(ONE, len(passes)) as stream:
        assert all(fill(stream, passes[5:]))
        assert found(stream, passes) == list(passes[CHUNK:])
        assert all(fill(stream, passes))
        assert found(stream, passes) == list(passes)


@pytest.mark.parametrize(
    "order",
    [
        pytest.param([*range(7), *range(8, CHUNK)], id="gap"),
        pytest.param([*range(7), *range(8, CHUNK), CHUNK - 1], id="gap_of_whole_length"),
        pytest.param([*range(7), *range(6, CHUNK - 1)], id="twice"),
    ],
)
def test_passes_that_do_not_follow_each_other_are_not_kept(store: FeatureStore, folder: Path, order: list[int]) -> None:
    with store.stream(ONE, 2 * CHUNK) as stream:
        for index in order:
            assert fill(stream, range(index, index + 1)) == [True]
        assert files(folder) == []
        assert all(fill(stream, range(CHUNK, 2 * CHUNK)))
        assert found(stream, range(2 * CHUNK)) == list(range(CHUNK, 2 * CHUNK))


def test_each_name_is_kept_by_itself_and_once(store: FeatureStore, folder: Path) -> None:
    passes = range(CHUNK)
    with store.stream(ONE, CHUNK) as stream:
        fill(stream, passes, "1")
        (first,) = files(folder)
        before = first.stat()
        assert stream.has(0, ["1"])
        assert not stream.has(0, ["1", "2"])
        assert stream.read(0, ["1", "2"]) is None
        for index in passes:
            assert stream.write(index, {name: (feature(index, name), 0.0) for name in ("1", "2")})
        assert found(stream, passes, "1") == found(stream, passes, "2") == list(passes)
        assert stream.has(0, ["1", "2"])
        assert stream.read(0, []) == {}
    after = first.stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)
    assert len(files(folder)) == 2


def test_a_longer_stream_goes_on_where_a_shorter_one_ended(store: FeatureStore, folder: Path) -> None:
    with store.stream(ONE, CHUNK + 4) as short, store.stream(ONE, 2 * CHUNK) as long:
        fill(short, range(CHUNK + 4))
        assert found(long, range(2 * CHUNK)) == list(range(CHUNK + 4))
        fill(long, range(2 * CHUNK))
        fill(short, range(CHUNK + 4))
        assert found(long, range(2 * CHUNK)) == list(range(2 * CHUNK))
        assert found(short, range(CHUNK + 4)) == list(range(CHUNK + 4))
    assert len(files(folder)) == 2


def test_of_two_that_write_the_same_passes_one_does(store: FeatureStore, folder: Path) -> None:
    passes = range(CHUNK)
    with store.stream(ONE, CHUNK) as one, store.stream(ONE, CHUNK) as other:
        fill(one, passes[:5])
        assert fill(other, passes) == [True] * CHUNK
        assert len(files(folder)) == 1
        fill(one, passes[5:])
        assert found(other, passes) == list(passes)
    assert len(files(folder)) == 1


def test_what_is_unfinished_goes_when_the_stream_closes(store: FeatureStore, folder: Path) -> None:
    with store.stream(ONE, CHUNK) as stream:
        fill(stream, range(CHUNK - 1))
        assert len(files(folder)) == 1
    assert files(folder) == []


def test_a_stream_of_unknown_length_ends_where_it_is_finished(store: FeatureStore, folder: Path) -> None:
    passes = range(CHUNK + 3)
    with store.stream(ONE, None) as stream:
        fill(stream, passes)
        assert found(stream, passes) == list(passes[:CHUNK])
        stream.finish()
        assert found(stream, passes) == list(passes)
        assert not stream.has(CHUNK + 3, ["0"])
        assert stream.read(CHUNK + 3, ["0"]) is None
    assert len(files(folder)) == 2


def test_what_is_finished_early_does_not_replace_what_is_longer(store: FeatureStore, folder: Path) -> None:
    passes = range(CHUNK)
    with store.stream(ONE, None) as stream, store.stream(ONE, None) as other:
        fill(stream, passes[:3])
        stream.finish()
        fill(stream, passes[:5])
        (draft,) = (path for path in files(folder) if path.suffix == ".draft")
        hidden = draft.rename(folder / "elsewhere")  # of another machine: its locks do not reach this one
        fill(other, passes)
        hidden.rename(draft)
        stream.finish()
        assert found(stream, passes) == list(passes)
    assert len(files(folder)) == 1


@pytest.mark.parametrize("index", [-1, 3])
def test_a_pass_that_the_stream_does_not_have_is_an_error(store: FeatureStore, index: int) -> None:
    with store.stream(ONE, 3) as stream:
        for ask in (stream.read, stream.has):
            with pytest.raises(IndexError, match=f"pass {index} of a stream of 3"):
                ask(index, ["0"])
        with pytest.raises(IndexError, match=f"pass {index} of a stream of 3"):
            stream.write(index, {})


# Damage


@pytest.fixture
def whole(store: FeatureStore, folder: Path) -> tuple[Path, bytes]:
    """A file of three passes of 64 bytes each, so that no byte of it is without meaning."""
    with store.stream(ONE, 3) as stream:
        fill(stream, range(3), size=16)
    (path,) = files(folder)
    return path, path.read_bytes()


def test_no_flipped_bit_is_ever_read(store: FeatureStore, whole: tuple[Path, bytes]) -> None:
    path, content = whole
    chance = random.Random(0)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with store.stream(ONE, 3) as stream:
            assert len(found(stream, range(3), size=16)) < 3, f"byte {place}"
        assert not path.exists(), f"byte {place}"


def test_no_file_that_was_cut_short_is_ever_read(store: FeatureStore, whole: tuple[Path, bytes]) -> None:
    path, content = whole
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with store.stream(ONE, 3) as stream:
            assert found(stream, range(3), size=16) == [], f"{length} bytes"
        assert not path.exists(), f"{length} bytes"


@pytest.mark.parametrize("length", [0, 1, 64, 100, 5000])
def test_a_file_that_changes_its_length_while_it_is_open_is_not_read(tmp_path: Path, length: int) -> None:
    store = FeatureStore(tmp_path, PLENTY)
    with store.stream(ONE, CHUNK) as stream:
        fill(stream, range(CHUNK), size=4096)  # several pages each: to touch one that is gone would kill the process
        (path,) = files(tmp_path)
        assert found(stream, range(1), size=4096) == [0]
        os.truncate(path, length)
        assert found(stream, range(1, CHUNK), size=4096) == []
        assert files(tmp_path) == []


def test_a_damaged_file_is_written_again(store: FeatureStore, whole: tuple[Path, bytes]) -> None:
    path, content = whole
    with store.stream(ONE, 3) as stream:
        assert found(stream, range(1), size=16) == [0]
        with path.open("r+b") as file:
            file.seek(70)
            file.write(bytes([content[70] ^ 255]))
        assert stream.has(1, ["0"])
        assert found(stream, range(1, 2), size=16) == []
        assert not stream.has(1, ["0"])
        fill(stream, range(3), size=16)
        assert found(stream, range(3), size=16) == [0, 1, 2]
    assert path.read_bytes() == content


def test_a_file_in_another_ones_place_is_not_read(store: FeatureStore, folder: Path, whole: tuple[Path, bytes]) -> None:
    with store.stream({"backbone": "another"}, 3) as stream:
        fill(stream, range(3), size=16, salt=1)
        (other,) = set(files(folder)) - {whole[0]}
        other.write_bytes(whole[1])
        assert found(stream, range(3), size=16, salt=1) == []
    assert files(folder) == [whole[0]]


# Room


def test_nothing_is_kept_or_found_at_a_limit_of_zero(store: FeatureStore, folder: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with FeatureStore(nowhere, 0).stream(ONE, 1) as stream:
        assert fill(stream, range(1)) == [False]
        assert found(stream, range(1)) == []
    assert not nowhere.exists()
    assert FeatureStore(nowhere, 0).bytes_used() == 0
    with store.stream(ONE, 1) as stream:
        fill(stream, range(1))
    with FeatureStore(folder, 0).stream(ONE, 1) as stream:
        assert not stream.has(0, ["0"])
        assert found(stream, range(1)) == []


def test_looking_for_features_creates_nothing(store: FeatureStore, folder: Path) -> None:
    with store.stream(ONE, 1) as stream:
        assert not stream.has(0, ["0"])
        assert found(stream, range(1)) == []
    assert store.bytes_used() == 0
    assert not folder.exists()


def test_the_longest_unused_make_room(folder: Path) -> None:
    size = file_size(folder)
    store = FeatureStore(folder, int(4.5 * size))
    for number in range(4):
        with store.stream({"number": number}, CHUNK) as stream:
            fill(stream, range(CHUNK), salt=number)
        (path,) = (path for path in files(folder) if path.stat().st_mtime > 100)
        os.utime(path, (number, number))
    with store.stream({"number": 0}, CHUNK) as stream:
        assert found(stream, range(3), salt=0) == [0, 1, 2]
    there = []
    for number in range(4, 6):
        with store.stream({"number": number}, CHUNK) as stream:
            assert all(fill(stream, range(CHUNK), salt=number))
        there.append([n for n in range(6) if store.stream({"number": n}, CHUNK).has(0, ["0"])])
    assert there == [[0, 2, 3, 4], [0, 3, 4, 5]]
    assert store.bytes_used() <= store.limit


def test_a_stream_does_not_evict_itself(folder: Path) -> None:
    size = file_size(folder)
    store = FeatureStore(folder, int(2.5 * size))
    with store.stream({"number": 0}, CHUNK) as other:
        fill(other, range(CHUNK))
    with store.stream({"number": 1}, 5 * CHUNK) as stream:
        kept = fill(stream, range(5 * CHUNK))
        assert kept == [True] * (2 * CHUNK) + [False] * (3 * CHUNK)
        assert "no room" in (stream.stopped or "")
        assert found(stream, range(5 * CHUNK)) == list(range(2 * CHUNK))
        assert len(files(folder)) == 2
    with store.stream({"number": 0}, CHUNK) as other:
        assert found(other, range(CHUNK)) == []  # it was older, and had to go


def test_what_can_never_fit_evicts_nothing(folder: Path) -> None:
    store = FeatureStore(folder, 2 * file_size(folder))
    with store.stream({"number": 0}, CHUNK) as small, store.stream({"number": 1}, CHUNK) as large:
        fill(small, range(CHUNK))
        assert fill(large, range(CHUNK), size=1024) == [False] * CHUNK
        assert found(small, range(CHUNK)) == list(range(CHUNK))


def test_a_file_that_grows_over_the_limit_is_dropped(folder: Path) -> None:
    store = FeatureStore(folder, file_size(folder))
    with store.stream(ONE, 2) as stream:
        assert fill(stream, range(1), size=16) == [True]
        assert fill(stream, range(1, 2), size=16 * 1024) == [False]
        assert files(folder) == []


def test_what_was_read_outlives_its_eviction(folder: Path) -> None:
    store = FeatureStore(folder, int(1.5 * file_size(folder)))
    with store.stream({"number": 0}, CHUNK) as evicted, store.stream({"number": 1}, CHUNK) as stream:
        fill(evicted, range(CHUNK))
        kept = evicted.read(3, ["0"])
        fill(stream, range(CHUNK), salt=1)
        assert found(stream, range(CHUNK), salt=1) == list(range(CHUNK))
        assert len(files(folder)) == 1
        assert torch.equal(kept["0"].tensor, feature(3))
        assert found(evicted, range(CHUNK)) == list(range(CHUNK))  # it has the file open
    with store.stream({"number": 0}, CHUNK) as evicted:
        assert found(evicted, range(CHUNK)) == []


def test_a_full_disk_costs_the_features_alone(small_disk: Path) -> None:
    store = FeatureStore(small_disk / "features", PLENTY)
    with store.stream(ONE, 2 * CHUNK) as stream:
        assert all(fill(stream, range(CHUNK), size=1024))
        free = shutil.disk_usage(small_disk).free
        assert fill(stream, range(CHUNK, CHUNK + 1), size=1024) == [True]
        assert fill(stream, range(CHUNK + 1, CHUNK + 2), size=2 * MIB) == [False]  # 8 MiB that were not to be foreseen
        assert stream.stopped == os.strerror(errno.ENOSPC)
        assert shutil.disk_usage(small_disk).free == free
        assert fill(stream, range(2 * CHUNK), size=1024) == [False] * 2 * CHUNK
        assert found(stream, range(2 * CHUNK), size=1024) == list(range(CHUNK))


def test_the_last_room_of_a_disk_is_left_to_others(small_disk: Path) -> None:
    store = FeatureStore(small_disk / "features", PLENTY)
    with store.stream(ONE, 100 * CHUNK) as stream:
        kept = fill(stream, range(100 * CHUNK), size=2048)
        assert not kept[-1]
        assert found(stream, range(100 * CHUNK), size=2048) == list(range(sum(kept)))
    disk = shutil.disk_usage(small_disk)
    assert disk.total / 20 <= disk.free < disk.total / 4


@pytest.mark.parametrize("name", ["file", "file/features"])
def test_a_folder_that_cannot_be_costs_the_features_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = FeatureStore(tmp_path / name, PLENTY)
    with store.stream(ONE, 1) as stream:
        assert found(stream, range(1)) == []
        assert fill(stream, range(1)) == [False]
        assert stream.stopped


# Processes


def test_nothing_is_begun_or_published_without_the_lock(
    store: FeatureStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "_PATIENCE", 0.0)
    folder.mkdir()
    for done in (0, CHUNK - 1):
        with store.stream({"done": done}, CHUNK) as stream:
            fill(stream, range(done))
            with (folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                assert fill(stream, range(done, done + 1)) == [False]
            assert "does not let go" in (stream.stopped or "")
            assert files(folder) == []


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[Any, Connection]]]:
    """Starts a process and gives what it says through a pipe; none is left behind."""
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


def use(say: Connection, folder: Path, limit: int, seed: int, rounds: int) -> None:
    """Read what is there of streams that others use as well, and write what is not: (passes read, passes written)."""
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
    say.send((hits, misses))


def test_processes_that_share_a_folder_never_read_what_is_wrong_and_stay_within_the_limit(
    folder: Path, started: Callable[..., tuple[Any, Connection]]
) -> None:
    limit = int(4.5 * file_size(folder, size=1024))  # of the nine files that the three streams would take
    begun = [started(use, folder, limit, seed, 15) for seed in range(3)]
    said = []
    for process, pipe in begun:
        said.append(pipe.recv())  # EOFError where the process failed
        process.join()
        assert process.exitcode == 0
    assert min(hits for hits, _ in said) > 0, said
    assert sum(misses for _, misses in said) > 9 * CHUNK, said  # more than to write each once: some were evicted
    assert 0 < FeatureStore(folder, limit).bytes_used() <= limit
    assert all(path.suffix == ".features" for path in files(folder))


def write_without_end(say: Connection, folder: Path, seed: int) -> None:
    store = FeatureStore(folder, PLENTY)
    for number in range(1_000_000):
        with store.stream({"seed": seed, "number": number}, CHUNK) as stream:
            fill(stream, range(1), salt=number, size=1024)
            if number == 0:
                say.send("begun")
            fill(stream, range(1, CHUNK), salt=number, size=1024)


def test_a_killed_writer_leaves_nothing_that_is_read_as_whole_and_no_rest(
    store: FeatureStore, folder: Path, started: Callable[..., tuple[Any, Connection]]
) -> None:
    chance = random.Random(0)
    rests = 0
    for seed in range(10):
        process, pipe = started(write_without_end, folder, seed)
        assert pipe.recv() == "begun"
        time.sleep(chance.uniform(0, 0.04))
        process.kill()
        process.join()
        left = [path for path in files(folder) if path.suffix != ".features"]
        rests += len(left)
        assert store.bytes_used() == sum(path.stat().st_size for path in files(folder))
        for number in range(len(files(folder)) + 1):
            with store.stream({"seed": seed, "number": number}, CHUNK) as stream:
                assert len(found(stream, range(CHUNK), salt=number, size=1024)) in (0, CHUNK)
        with store.stream({"after": seed}, CHUNK) as stream:
            assert all(fill(stream, range(CHUNK)))
        assert all(path.suffix == ".features" for path in files(folder)), left
        shutil.rmtree(folder)
    assert rests > 0, "no writer was killed in the middle of a file"


def begin_to_write(say: Connection, folder: Path, limit: int) -> None:
    with FeatureStore(folder, limit).stream({"of": "a process that hangs"}, CHUNK) as stream:
        fill(stream, range(1))
        say.send("begun")
        time.sleep(600)


def test_what_is_being_written_counts_for_what_it_will_take_and_stays_until_its_process_dies(
    folder: Path, started: Callable[..., tuple[Any, Connection]]
) -> None:
    limit = int(1.9 * file_size(folder))
    process, pipe = started(begin_to_write, folder, limit)
    assert pipe.recv() == "begun"
    (draft,) = files(folder)
    store = FeatureStore(folder, limit)
    with store.stream(ONE, CHUNK) as stream:
        assert fill(stream, range(CHUNK)) == [False] * CHUNK
        assert draft.exists()
    process.kill()
    process.join()
    assert store.bytes_used() == draft.stat().st_size > 0
    with store.stream(ONE, CHUNK) as stream:
        assert fill(stream, range(CHUNK)) == [True] * CHUNK
    assert not draft.exists()


def read_with_few_files(say: Connection, folder: Path) -> None:
    """Hold on to what is read until no more files can be open; then let go of it: (passes read before, and after)."""
    with FeatureStore(folder, PLENTY).stream(ONE, CHUNK) as stream:
        stream.has(0, ["0"])
        unused = [os.dup(0) for _ in range(5)]  # the lowest there are, wherever this process has others open
        for file in unused:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(unused) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        kept = [stream.read(index, ["0"]) for index in range(CHUNK)]
        before = len([one for one in kept if one is not None])
        del kept
        say.send((before, found(stream, range(CHUNK))))


def test_what_cannot_be_opened_for_a_while_is_not_taken_for_damaged(
    store: FeatureStore, folder: Path, started: Callable[..., tuple[Any, Connection]]
) -> None:
    with store.stream(ONE, CHUNK) as stream:
        fill(stream, range(CHUNK))
    _, pipe = started(read_with_few_files, folder)
    before, after = pipe.recv()
    assert 0 < before < CHUNK
    assert after == list(range(CHUNK))
