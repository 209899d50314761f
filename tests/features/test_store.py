"""The feature store: tensors are read exactly as written, even after damage to files."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.features import store as feature_store
from harness.features.store import CHUNK, FeatureStore
from tests.support.feature_streams import IDENTITY, LARGE, feature, files, fill, found

# ---- what is written is read -------------------------------------------------------------------------------------


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
def test_dense_tensor_keeps_dtype_shape_and_strides(
    store: FeatureStore, make: Callable[[torch.dtype], Tensor], dtype: torch.dtype
) -> None:
    tensors = [make(dtype), make(dtype)]
    with store.stream(IDENTITY, 2) as stream:
        for index, tensor in enumerate(tensors):
            assert stream.write(index, {"map": (tensor, index / 3)})
        for index, tensor in enumerate(tensors):
            cached = (stream.read(index, ["map"]) or {})["map"]
            assert (cached.tensor.dtype, cached.tensor.shape) == (tensor.dtype, tensor.shape)
            assert cached.tensor.stride() == tensor.stride()
            assert torch.equal(cached.tensor, tensor)
            assert cached.seconds == index / 3


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.rand(4, 6)[:, ::2], id="gaps"),
        pytest.param(torch.rand(4, 1).expand(4, 5), id="shared"),
        pytest.param(torch.rand(20).as_strided((4, 6), (2, 1)), id="overlapping"),
    ],
)
def test_other_tensor_becomes_contiguous(store: FeatureStore, tensor: Tensor) -> None:
    with store.stream(IDENTITY, 1) as stream:
        stream.write(0, {"map": (tensor, 0.0)})
        cached = (stream.read(0, ["map"]) or {})["map"].tensor
    assert cached.is_contiguous()
    assert torch.equal(cached, tensor)


def test_values_keep_their_bits_and_lose_their_graph(store: FeatureStore) -> None:
    special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45], requires_grad=True)
    with torch.inference_mode():
        inferred = torch.ones(3) * 2
    with store.stream(IDENTITY, 1) as stream:
        stream.write(0, {"special": (special, 0.0), "inferred": (inferred, 0.0)})
        cached = stream.read(0, ["special", "inferred"])
    assert cached is not None and not cached["special"].tensor.requires_grad
    assert torch.equal(cached["special"].tensor.view(torch.int32), special.detach().view(torch.int32))
    weight = torch.ones(3, requires_grad=True)
    (weight * cached["inferred"].tensor).sum().backward()  # not an inference tensor any more


def test_files_are_safetensors(store: FeatureStore, folder: Path) -> None:
    with store.stream(IDENTITY, 3) as stream:
        fill(stream, range(3))
    (path,) = files(folder)
    assert all(torch.equal(tensor, feature(int(index))) for index, tensor in load_file(path).items())


def test_any_tensor_name_works(store: FeatureStore) -> None:
    names = ["stages.0", "../stem", "a/b", "ä ö", ".hidden", "map.tmp", ""]
    with store.stream(IDENTITY, 1) as stream:
        assert stream.write(0, {name: (torch.tensor(number), 0.0) for number, name in enumerate(names)})
        cached = stream.read(0, names) or {}
    assert [cached[name].tensor.item() for name in names] == list(range(len(names)))


def test_identity_separates_streams(store: FeatureStore) -> None:
    with store.stream({"weights": "a", "crop": [64, 64]}, 1) as stream:
        fill(stream, range(1))
    with store.stream({"crop": [64, 64], "weights": "a"}, 1) as same, store.stream({"weights": "b"}, 1) as other:
        assert found(same, range(1)) == [0]
        assert not other.has(0, ["0"])
        assert found(other, range(1)) == []


def test_reader_and_writer_own_their_tensors(store: FeatureStore) -> None:
    with store.stream(IDENTITY, 2) as stream:
        tensor = feature(0)
        stream.write(0, {"0": (tensor, 0.0)})
        tensor.zero_()  # before the file is written
        fill(stream, range(1, 2))
        (stream.read(0, ["0"]) or {})["0"].tensor.zero_()
        assert found(stream, range(2)) == [0, 1]


def test_passes_become_readable_chunk_by_chunk(store: FeatureStore, folder: Path) -> None:
    passes = 2 * CHUNK + 3
    with store.stream(IDENTITY, passes) as stream:
        for index in range(passes):
            assert fill(stream, range(index, index + 1)) == [True]
            complete = index + 1 if index == passes - 1 else (index + 1) // CHUNK * CHUNK
            assert stream.has(index, ["0"]) == (index < complete)
            assert found(stream, range(passes)) == list(range(complete))
    assert len(files(folder)) == 3


def test_large_passes_share_a_file_with_fewer(
    store: FeatureStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "_BUFFER", 4 * feature(0).nbytes)
    with store.stream(IDENTITY, CHUNK) as stream:
        fill(stream, range(CHUNK))
        assert found(stream, range(CHUNK)) == list(range(CHUNK))
        assert found(stream, range(CHUNK)[::-3]) == list(range(CHUNK)[::-3])
    assert len(files(folder)) == CHUNK // 4


@pytest.mark.parametrize(
    ("order", "cached"),
    [
        pytest.param([*range(5, CHUNK)], [*range(5, CHUNK)], id="begins in the middle"),
        pytest.param([*range(7), *range(8, CHUNK)], [*range(7), *range(8, CHUNK)], id="gap"),
        pytest.param([*range(7), *range(6, CHUNK)], [*range(CHUNK)], id="twice"),
    ],
)
def test_only_consecutive_passes_share_a_file(store: FeatureStore, order: list[int], cached: list[int]) -> None:
    with store.stream(IDENTITY, CHUNK) as stream:
        for index in order:
            assert fill(stream, range(index, index + 1)) == [True]
        assert found(stream, range(CHUNK)) == cached
        fill(stream, range(CHUNK))
        assert found(stream, range(CHUNK)) == list(range(CHUNK))


def test_each_name_is_written_once(store: FeatureStore, folder: Path) -> None:
    passes = range(CHUNK)
    with store.stream(IDENTITY, CHUNK) as stream:
        fill(stream, passes, "1")
        (first,) = files(folder)
        before = first.stat()
        assert stream.has(0, ["1"])
        assert not stream.has(0, ["1", "2"])
        assert stream.read(0, ["1", "2"]) is None
        for index in passes:
            assert stream.write(index, {name: (feature(index, name), 0.0) for name in ("1", "2")})
        assert found(stream, passes, "1") == found(stream, passes, "2") == list(passes)
        assert stream.read(0, []) == {}
    assert first.stat().st_ino == before.st_ino
    assert len(files(folder)) == 2


def test_longer_stream_continues_a_shorter_one(store: FeatureStore) -> None:
    with store.stream(IDENTITY, CHUNK + 4) as short, store.stream(IDENTITY, 2 * CHUNK) as long:
        fill(short, range(CHUNK + 4))
        assert found(long, range(2 * CHUNK)) == list(range(CHUNK + 4))
        fill(long, range(2 * CHUNK))
        assert found(long, range(2 * CHUNK)) == list(range(2 * CHUNK))
        assert found(short, range(CHUNK + 4)) == list(range(CHUNK + 4))


def test_two_writers_of_one_stream_write_one_file(store: FeatureStore, folder: Path) -> None:
    passes = range(CHUNK)
    with store.stream(IDENTITY, CHUNK) as one, store.stream(IDENTITY, CHUNK) as other:
        fill(one, passes[:5])
        fill(other, passes)
        fill(one, passes[5:])
        assert found(one, passes) == found(other, passes) == list(passes)
    assert len(files(folder)) == 1


def test_stream_of_unknown_length_ends_at_finish(store: FeatureStore, folder: Path) -> None:
    passes = range(CHUNK + 3)
    with store.stream(IDENTITY, None) as stream:
        fill(stream, passes)
        assert found(stream, passes) == list(passes[:CHUNK])
        stream.finish()
        assert found(stream, passes) == list(passes)
        assert not stream.has(CHUNK + 3, ["0"])
        fill(stream, range(CHUNK + 4, CHUNK + 6))
    assert len(files(folder)) == 2, "what is unfinished is dropped at close"


@pytest.mark.parametrize("index", [-1, 3])
def test_pass_outside_the_stream_is_an_error(store: FeatureStore, index: int) -> None:
    with store.stream(IDENTITY, 3) as stream:
        for call in (stream.read, stream.has):
            with pytest.raises(IndexError, match=f"pass {index} of a stream of 3"):
                call(index, ["0"])
        with pytest.raises(IndexError, match=f"pass {index} of a stream of 3"):
            stream.write(index, {})


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(store: FeatureStore, folder: Path) -> tuple[Path, bytes]:
    """A file of three passes of 64 bytes each."""
    with store.stream(IDENTITY, 3) as stream:
        fill(stream, range(3), size=16)
    (path,) = files(folder)
    return path, path.read_bytes()


def test_flipped_bits_are_never_read(store: FeatureStore, whole: tuple[Path, bytes]) -> None:
    """In the header, safetensors repeats types and shapes that the store has under a checksum: those do no harm."""
    path, content = whole
    chance = random.Random(0)
    harmless = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with store.stream(IDENTITY, 3) as stream:
            unharmed = len(found(stream, range(3), size=16)) == 3
        assert path.exists() == unharmed, f"byte {place}"
        assert not unharmed or place < len(content) - 3 * 64, f"byte {place}"
        harmless += unharmed
    assert harmless < 100


def test_truncated_files_are_never_read(store: FeatureStore, whole: tuple[Path, bytes]) -> None:
    path, content = whole
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with store.stream(IDENTITY, 3) as stream:
            assert found(stream, range(3), size=16) == [], f"{length} bytes"
        assert not path.exists(), f"{length} bytes"


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_file_truncated_while_open_is_not_read(tmp_path: Path, length: int) -> None:
    with FeatureStore(tmp_path, LARGE).stream(IDENTITY, CHUNK) as stream:
        fill(stream, range(CHUNK), size=4096)
        (path,) = files(tmp_path)
        assert found(stream, range(1), size=4096) == [0]
        os.truncate(path, length)
        assert found(stream, range(1, CHUNK), size=4096) == []
        assert files(tmp_path) == []


def test_damaged_file_is_rewritten(store: FeatureStore, whole: tuple[Path, bytes]) -> None:
    path, content = whole
    with store.stream(IDENTITY, 3) as stream:
        assert found(stream, range(1), size=16) == [0]
        with path.open("r+b") as file:
            file.seek(len(content) - 1)
            file.write(bytes([content[-1] ^ 255]))
        assert stream.has(2, ["0"])
        assert found(stream, range(2, 3), size=16) == []
        assert not stream.has(2, ["0"])
        fill(stream, range(3), size=16)
        assert found(stream, range(3), size=16) == [0, 1, 2]
    assert path.read_bytes() == content


def test_file_of_another_stream_is_not_read(store: FeatureStore, folder: Path, whole: tuple[Path, bytes]) -> None:
    with store.stream({"backbone": "another"}, 3) as stream:
        fill(stream, range(3), size=16, salt=1)
        (other,) = set(files(folder)) - {whole[0]}
        other.write_bytes(whole[1])
        assert found(stream, range(3), size=16, salt=1) == []
    assert files(folder) == [whole[0]]
