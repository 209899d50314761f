"""The feature store: tensors that are the same for every method, trial and epoch, cached on disk.

It knows tensors, not networks: `keys.py` decides what an identity covers. Consecutive forward passes lie together in a
safetensors file, each with a checksum. All files together stay within a limit: the least recently used are evicted.
Any number of processes may share a folder. If the disk is full, read-only or without locks, features are not cached;
runs never fail.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from harness.util.files import digest

CHUNK = 16
"""Forward passes in one file, at most."""

SPARE = 1 << 30
"""Bytes of the disk that are left free, or a twentieth of the disk if that is less."""

_BUFFER = 64 << 20
"""Approximate bytes of one file. Passes are buffered until their file is written, so a file holds fewer large ones."""
_LOCK_TIMEOUT = 30.0
"""Seconds to wait for the folder's lock, which is held while one file is written."""
_FILE, _DRAFT, _LOCK = ".safetensors", ".tmp", ".lock"


class CachedTensor(NamedTuple):
    """A tensor read from the store. The reader owns it: writing to it does not change the file or another read."""

    tensor: Tensor
    seconds: float
    """How long it took to compute, as passed to `FeatureStream.write`."""


class FeatureStore:
    """A folder of cached tensors that may take `limit` bytes; with a limit of 0 nothing is written or found.

    The first write creates the folder.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit

    def stream(self, identity: Mapping[str, Any], passes: int | None) -> FeatureStream:
        """The cached tensors of a sequence of `passes` forward passes; None if their number is not known yet.

        `identity` holds JSON values: everything that the tensors depend on.
        """
        return FeatureStream(self, digest(dict(identity))[:32], passes)

    def add(self, chunk: _Chunk) -> None:
        """Write a chunk to its file, unless that exists. Raises `OSError` and `SafetensorError`."""
        path = chunk.label.path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / _LOCK, timeout=_LOCK_TIMEOUT, poll_interval=0.005, fallback_to_soft=False):
            for left in self.folder.glob(f"*{_DRAFT}"):  # under the lock: left by killed processes
                left.unlink(missing_ok=True)
            if path.exists():
                return
            self._make_room(chunk.label.stream, chunk.max_size())
            draft = path.with_suffix(_DRAFT)
            try:
                chunk.save(draft)
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)

    def _make_room(self, stream: str, size: int) -> None:
        """Evict the least recently used files until `size` more bytes fit; evict nothing if that is not enough.

        The writing stream's own files are not evicted. Raises `OSError` with `ENOSPC`.
        """
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # removed by a reader, as it was damaged
                status = path.stat()
                files.append((status.st_mtime_ns, path, status.st_size))
        missing = max(sum(length for *_, length in files) + size - self.limit, size - _free(self.folder))
        victims = []
        for _, path, length in sorted(files):
            if missing > 0 and path.name != _LOCK and not path.name.startswith(stream):
                victims.append(path)
                missing -= length
        if missing > 0:
            raise OSError(errno.ENOSPC, f"no space left within the limit of {self.limit} bytes and on the disk")
        for path in victims:
            path.unlink(missing_ok=True)


class FeatureStream:
    """The cached tensors of one sequence of forward passes, by pass (from 0) and name. For one thread at a time."""

    def __init__(self, store: FeatureStore, identity: str, passes: int | None):
        self._store, self._identity, self._passes = store, identity, passes
        self._open: dict[str, _File] = {}
        self._chunks: dict[str, _Chunk] = {}
        self.stopped: str | None = None if store.limit > 0 else "the size limit is 0"
        """Why nothing more is written; None as long as passes are written."""

    def __enter__(self) -> FeatureStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, index: int, names: Sequence[str]) -> bool:
        """Whether `read` should find the tensors, according to the files' headers; no tensor is verified."""
        return all(self._file(index, name) is not None for name in names)

    def read(self, index: int, names: Sequence[str]) -> dict[str, CachedTensor] | None:
        """The tensors of forward pass `index` with these `names`; None if any of them is missing or damaged.

        Each tensor has the dtype, shape and strides that it was written with, is on the CPU, and was verified with its
        checksum in this call. A damaged file is removed.
        """
        found: dict[str, CachedTensor] = {}
        for name in names:
            file = self._file(index, name)
            cached = file.read(index) if file is not None else None
            if cached is None:
                return None
            found[name] = cached
        return found

    def write(self, index: int, tensors: Mapping[str, tuple[Tensor, float]]) -> bool:
        """Add the tensors of forward pass `index`: by name, the tensor and the seconds that computing it took.

        Consecutive passes are buffered and become readable together, after `CHUNK` of them at the latest. Cached passes
        are not written again. A tensor whose elements overlap or have gaps is stored as a contiguous one.

        Returns False from the first pass on for which there is no space (within the limit or on the disk) or the folder
        cannot be written; `stopped` says why. Never raises for such a reason.
        """
        self._check(index)
        if self.stopped is None:
            with self._stop_on_error():
                for name, (tensor, seconds) in tensors.items():
                    self._write(index, name, tensor, seconds)
        return self.stopped is None

    def finish(self) -> None:
        """Write the buffered passes: no pass follows."""
        with self._stop_on_error():
            for name in list(self._chunks):
                self._store.add(self._chunks.pop(name))

    def close(self) -> None:
        """Discard the buffered passes and close the files."""
        self._chunks.clear()
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _write(self, index: int, name: str, tensor: Tensor, seconds: float) -> None:
        chunk = self._chunks.get(name)
        cached = self._file(index, name) is not None
        if chunk is not None and (cached or chunk.next != index):
            self._store.add(self._chunks.pop(name))
            chunk = None
        if cached:
            return
        if chunk is None:
            chunk = self._chunks[name] = _Chunk(_Label(self._identity, name, index), _file_length(index, tensor.nbytes))
        chunk.append(tensor, seconds)
        if len(chunk.entries) == chunk.length or chunk.next == self._passes:
            self._store.add(self._chunks.pop(name))

    @contextlib.contextmanager
    def _stop_on_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
            self.stopped = getattr(error, "strerror", None) or str(error)
            self._chunks.clear()

    def _file(self, index: int, name: str) -> _File | None:
        """The file that holds pass `index`, opened once for all passes that are read from it in sequence."""
        self._check(index)
        if self._store.limit <= 0:
            return None
        if name in self._open:
            if index in self._open[name]:
                return self._open[name]
            self._open.pop(name).close()
        for first in _first_passes(index):
            file = _File.open(self._store.folder, _Label(self._identity, name, first))
            if file is not None and index in file:
                self._open[name] = file
                return file
            if file is not None:
                file.close()
        return None

    def _check(self, index: int) -> None:
        if index < 0 or (self._passes is not None and index >= self._passes):
            raise IndexError(f"pass {index} of a stream of {self._passes}")


class _Label(NamedTuple):
    """Identifies a file: the stream's digest, a name in that stream, and the first pass."""

    stream: str
    name: str
    first: int

    def path(self, folder: Path) -> Path:
        return folder / f"{self.stream}-{self.first:08d}-{quote(self.name, safe='')}{_FILE}"


class _Entry(NamedTuple):
    """The metadata of one pass. Safetensors itself does not record strides and checksums."""

    dtype: str
    shape: list[int]
    strides: list[int]
    seconds: float
    crc32: int = 0

    def checksum(self, label: _Label, index: int, data: Tensor) -> int:
        """Of the tensor's bytes (uint8 [N]) and of all that is known about them."""
        return zlib.crc32(data.numpy().data, zlib.crc32(json.dumps([label, index, self[:-1]]).encode()))


@dataclass
class _Chunk:
    """Consecutive passes that will share a file of `length` passes."""

    label: _Label
    length: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By pass, with the dimensions in memory order."""
    entries: list[_Entry] = field(default_factory=list)

    @property
    def next(self) -> int:
        return self.label.first + len(self.entries)

    def append(self, tensor: Tensor, seconds: float) -> None:
        tensor = tensor.detach()
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        if not tensor.permute(order).is_contiguous():
            tensor, order = tensor.contiguous(), list(range(tensor.dim()))
        entry = _Entry(str(tensor.dtype).partition(".")[2], list(tensor.shape), list(tensor.stride()), float(seconds))
        stored = tensor.permute(order).to("cpu", copy=True)  # the caller may change its tensor before this is written
        checksum = entry.checksum(self.label, self.next, stored.reshape(-1).view(torch.uint8))
        self.tensors[str(self.next)] = stored
        self.entries.append(entry._replace(crc32=checksum))

    def save(self, path: Path) -> None:
        """Raises `OSError` and `SafetensorError`."""
        save_file(self.tensors, path, {"index": self._index()})

    def max_size(self) -> int:
        """At least the file's bytes."""
        header = 1024 + 2 * len(self._index()) + 256 * len(self.entries)
        return header + sum(tensor.nbytes for tensor in self.tensors.values())

    def _index(self) -> str:
        return json.dumps({"label": self.label, "passes": self.entries}, separators=(",", ":"))


class _File:
    """A file of the store, open for reading.

    It is read and not memory-mapped, as safetensors would do: a mapped file that is truncated kills the process, and
    one reader's writes to a mapped tensor would be visible to the next one.
    """

    def __init__(self, path: Path, label: _Label):
        """Raises `OSError`."""
        self._path, self._label = path, label
        self._passes: list[tuple[_Entry, int, int]] = []
        """Each pass's entry, and where its bytes begin and end."""
        self._file = FileIO(path)

    @classmethod
    def open(cls, folder: Path, label: _Label) -> _File | None:
        """None if the file does not exist or cannot be read; a damaged one is removed."""
        with contextlib.suppress(OSError):
            file = cls(label.path(folder), label)
            try:
                file._read_header()
                return file
            except (ValueError, LookupError, TypeError):
                file.close(remove=True)
            except OSError:
                file.close()
        return None

    def __contains__(self, index: int) -> bool:
        return 0 <= index - self._label.first < len(self._passes)

    def read(self, index: int) -> CachedTensor | None:
        """A pass that the file contains; None if it is damaged, which removes the file, or cannot be read now."""
        entry, begin, end = self._passes[index - self._label.first]
        data = torch.empty(end - begin, dtype=torch.uint8)
        unread = data.numpy().data
        try:
            while unread and (count := os.preadv(self._file.fileno(), [unread], end - len(unread))):
                unread = unread[count:]
        except OSError:
            return None
        if unread or entry.checksum(self._label, index, data) != entry.crc32:
            self.close(remove=True)
            return None
        tensor = data.view(getattr(torch, entry.dtype)).as_strided(entry.shape, entry.strides)
        return CachedTensor(tensor, entry.seconds)

    def close(self, remove: bool = False) -> None:
        """Close it; with `remove`, also remove it, unless another file has taken its place."""
        self._passes.clear()
        with contextlib.suppress(OSError):
            if remove and os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                self._path.unlink()
        self._file.close()

    def _read_header(self) -> None:
        """The layout of a safetensors file: the header's length (u64), the header (JSON), the tensors' bytes.

        Raises `ValueError`, `LookupError` or `TypeError` for any other file, and `OSError`.
        """
        descriptor = self._file.fileno()
        size = os.fstat(descriptor).st_size
        start = 8 + min(int.from_bytes(os.pread(descriptor, 8, 0), "little"), size)
        header = json.loads(os.pread(descriptor, start - 8, 8))
        index = json.loads(header["__metadata__"]["index"])
        for number, entry in enumerate(index["passes"], self._label.first):
            begin, end = header[str(number)]["data_offsets"]
            if not 0 <= begin <= end <= size - start:
                raise ValueError("cut short")
            self._passes.append((_Entry(*entry), start + begin, start + end))
        if index["label"] != list(self._label) or max(end for *_, end in self._passes) != size:
            raise ValueError("not the file that was written")
        with contextlib.suppress(OSError):  # a read-only folder
            os.utime(descriptor)  # eviction is by time of last use


def _file_length(first: int, nbytes: int) -> int:
    """Number of passes of `nbytes` bytes in the file that begins with pass `first`: a power of two."""
    length = CHUNK
    while length > 1 and (first % length or length * nbytes > _BUFFER):
        length //= 2
    return length


def _first_passes(index: int) -> list[int]:
    """The possible first passes of the file that holds pass `index`; see `_file_length`."""
    return sorted({index - index % (1 << power) for power in range(CHUNK.bit_length())})


def _free(folder: Path) -> float:
    """Bytes that may still be written to the disk, without those that are left free."""
    disk = os.statvfs(folder)
    if not disk.f_blocks:  # the file system does not report it
        return math.inf
    return disk.f_bavail * disk.f_frsize - min(SPARE, disk.f_blocks * disk.f_frsize // 20)
