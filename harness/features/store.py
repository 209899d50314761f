"""The store of frozen features: tensors that are the same for every method, trial and epoch, kept on disk.

It knows tensors, not networks. What a sequence of forward passes puts out under a name lies in files of `CHUNK` passes:
the tensors' bytes, then an index that says what they are, each part under a checksum. A file that is cut short or
damaged is as good as none, and goes. All files together stay within a limit: the longest unused make room for new ones.

Any number of processes may read and write one folder. A file appears whole or not at all; one that is evicted while it
is mapped stays readable for whoever mapped it. A disk that is full, read-only or without locks costs the features, and
never a run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from harness.util.files import digest

CHUNK = 16
"""Forward passes in one file."""

SPARE = 1 << 30
"""Bytes of the disk that are left to others, or a twentieth of it where that is less: no run fails for a cache."""

_FORMAT = 1
_FILE, _DRAFT = ".features", ".draft"
_ALIGNMENT = 64
_END = struct.Struct("<4sIQ")
"""The last bytes of a file: a mark, the index's checksum and its length."""
_MARK = b"FEAT"
_INDEX, _ENTRY = 1024, 320
"""Bytes that are reserved for an index besides its entries, and for each of these; it takes less."""
_PATIENCE = 30.0
"""Seconds to wait for the folder's lock, which is held for milliseconds."""


class CachedTensor(NamedTuple):
    """A tensor of the store, the reader's own: what is written into it reaches neither the file nor another reader."""

    tensor: Tensor
    seconds: float
    """What computing it took, as told to `write`."""


class FeatureStore:
    """A folder of features, of which all files together may take `limit` bytes; at 0 nothing is kept, nothing found.

    Creates nothing before something is written.
    """

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit

    @property
    def limit(self) -> int:
        return self._limit

    def stream(self, identity: Mapping[str, Any], passes: int | None) -> FeatureStream:
        """The features of `passes` forward passes; None where their number shows at the end (`finish`).

        `identity` holds JSON values: everything that the tensors depend on.
        """
        name = digest({"format": _FORMAT, "identity": dict(identity)})[:32]
        return FeatureStream(self, self._folder, name, passes)

    def bytes_used(self) -> int:
        """What all files take, with those that are being written and what killed processes left of theirs."""
        return sum(status.st_size for _, status in self._files())

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith((_FILE, _DRAFT)):
                    with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                        yield Path(entry.path), entry.stat(follow_symlinks=False)

    def _begin(self, label: _Label, passes: int, size: int) -> _Draft | None:
        """A draft that may take `size` bytes; None where its file is there, or is being written by another process.

        Raises `OSError`.
        """
        path = label.path(self._folder)
        if _holds(path, label, passes):
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._folder / ".lock"):
            drafts = self._living_drafts()
            if _holds(path, label, passes) or any(_target(draft) == path for draft in drafts):
                return None
            self._make_room(label, size)
            return _Draft(path, label, passes, size)

    def _publish(self, draft: _Draft) -> None:
        """Raises `OSError`."""
        draft.finish()
        with _locked(self._folder / ".lock"):
            self._living_drafts()
            self._make_room(draft.label, 0)
            if _holds(draft.path, draft.label, len(draft)):  # more of it came meanwhile, where this one was cut off
                draft.discard()
            else:
                draft.publish()

    def _living_drafts(self) -> list[Path]:
        """Drafts whose writer lives. What a killed one left is removed: it locks nothing any more."""
        drafts = [path for path, _ in self._files() if path.name.endswith(_DRAFT)]
        return [path for path in drafts if not _remove_dead(path)]

    def _make_room(self, label: _Label, size: int) -> None:
        """Evict, the longest unused first, until `size` more bytes fit; nothing where that would not be enough.

        The writing stream's own files stay: to evict its head for its tail would leave it with neither. Raises
        `OSError` of `ENOSPC`.
        """
        files = [(status.st_mtime_ns, path, status.st_size) for path, status in self._files()]
        short = max(sum(length for *_, length in files) + size - self._limit, size - _free(self._folder))
        victims = []
        for _, path, length in sorted(files):
            if short > 0 and path.name.endswith(_FILE) and not path.name.startswith(label.stream):
                victims.append(path)
                short -= length
        if short > 0:
            raise OSError(errno.ENOSPC, f"no room within {self._limit} bytes and what the disk can spare")
        for path in victims:
            path.unlink(missing_ok=True)


class FeatureStream:
    """The features of one sequence of forward passes, by pass (from 0) and name.

    For one thread at a time. A context manager: leaving it closes it.
    """

    def __init__(self, store: FeatureStore, folder: Path, identity: str, passes: int | None):
        self._store, self._folder, self._identity, self._passes = store, folder, identity, passes
        self._open: dict[str, _File] = {}
        self._drafts: dict[str, _Draft] = {}
        self.stopped: str | None = None if store.limit > 0 else "nothing is kept at a limit of 0"
        """Why nothing more is written; None as long as something is."""

    def __enter__(self) -> FeatureStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, index: int, names: Sequence[str]) -> dict[str, CachedTensor] | None:
        """What forward pass `index` put out under all of `names`; None where any of it is missing or damaged.

        Each tensor is mapped from its file, has the dtype, shape and strides it was written with, lies on the CPU and
        was compared with its checksum in this call.
        """
        files = {name: self._file(index, name) for name in names}
        found: dict[str, CachedTensor] = {}
        for name, file in files.items():
            if file is None:
                return None
            try:
                found[name] = file.read(index)
            except _Damaged:
                del self._open[name]
                file.close(remove=True)
                return None
            except OSError:  # too many files or maps are open
                return None
        return found

    def has(self, index: int, names: Sequence[str]) -> bool:
        """Whether `read` would find something, as far as the files' indices tell: no tensor is looked at."""
        return all(self._file(index, name) is not None for name in names)

    def write(self, index: int, tensors: Mapping[str, tuple[Tensor, float]]) -> bool:
        """Keep what forward pass `index` put out: by name, the tensor and the seconds that computing it took.

        A file is there once all of its passes were written, one after the other; a pass that does not go on from the
        one before is not kept, nor is any until the next file begins. What is there already is not written again. A
        tensor of which elements share memory, or with gaps between them, is kept as a contiguous one.

        False where there is no room (within the limit, or on the disk) or the folder cannot be written, and from then
        on; `stopped` says why. Never raises for such a reason.
        """
        self._check(index)
        if self.stopped is None:
            with self._stopping():
                for name, (tensor, seconds) in tensors.items():
                    self._write(index, name, tensor, seconds)
        return self.stopped is None

    def finish(self) -> None:
        """No pass follows: the last file of each name is whole with those that it has."""
        with self._stopping():
            for name in list(self._drafts):
                self._publish(name)

    def close(self) -> None:
        """Drop what is unfinished, and close the files. Tensors that were read stay what they are."""
        self._drop(*self._drafts)
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _write(self, index: int, name: str, tensor: Tensor, seconds: float) -> None:
        draft = self._drafts.get(name)
        if draft is not None and draft.next != index:
            self._drop(name)
            draft = None
        if index % CHUNK == 0:
            self._drop(name)
            passes = CHUNK if self._passes is None else min(CHUNK, self._passes - index)
            size = _INDEX + passes * (_aligned(tensor.nbytes) + _ENTRY)
            draft = self._store._begin(_Label(self._identity, name, index), passes, size)
            if draft is not None:
                self._drafts[name] = draft
        if draft is None:
            return
        draft.add(tensor, seconds)
        if draft.complete:
            self._publish(name)

    def _publish(self, name: str) -> None:
        self._store._publish(self._drafts[name])
        del self._drafts[name]

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """The disk's first refusal is the end of writing."""
        try:
            yield
        except OSError as error:
            self.stopped = error.strerror or str(error)
            self._drop(*self._drafts)

    def _drop(self, *names: str) -> None:
        for name in names:
            draft = self._drafts.pop(name, None)
            if draft is not None:
                draft.discard()

    def _file(self, index: int, name: str) -> _File | None:
        """The file with pass `index`, opened once for all the passes that are read of it one after the other."""
        self._check(index)
        file = self._open.get(name)
        if file is not None:
            if index in file:
                return file
            del self._open[name]
            file.close()
        if self._store.limit <= 0:
            return None
        label = _Label(self._identity, name, index - index % CHUNK)
        file = _File.open(label.path(self._folder), label)
        if file is None:
            return None
        self._open[name] = file
        return file if index in file else None

    def _check(self, index: int) -> None:
        if index < 0 or (self._passes is not None and index >= self._passes):
            raise IndexError(f"pass {index} of a stream of {self._passes}")


class _Label(NamedTuple):
    """What a file is about: a stream's digest, a name in it, and the first of its passes."""

    stream: str
    name: str
    first: int

    def path(self, folder: Path) -> Path:
        return folder / f"{self.stream}-{self.first:08d}-{quote(self.name, safe='')}{_FILE}"


class _Damaged(Exception):
    """A file that is not what was written."""


class _File:
    """A published file, open for reading."""

    def __init__(self, path: Path, file: FileIO, label: _Label):
        """Raises `_Damaged`."""
        self._path, self._file, self._first, self._used = path, file, label.first, False
        index = _read_index(file)
        if index.get("label") != list(label):
            raise _Damaged
        self._entries: list[dict[str, Any]] = index["passes"]

    @classmethod
    def open(cls, path: Path, label: _Label) -> _File | None:
        """None where there is none or it cannot be read; a damaged one is removed."""
        try:
            file = FileIO(path)
        except OSError:
            return None
        try:
            return cls(path, file, label)
        except _Damaged:
            _close(file, remove=path)
        except OSError:
            _close(file)
        return None

    def __contains__(self, index: int) -> bool:
        return 0 <= index - self._first < len(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> CachedTensor:
        """Raises `_Damaged`, and `OSError` where it cannot be mapped."""
        self._touch()
        entry = self._entries[index - self._first]
        dtype, shape, strides = getattr(torch, entry["dtype"]), entry["shape"], entry["strides"]
        if not entry["bytes"]:
            return CachedTensor(torch.empty_strided(shape, strides, dtype=dtype), entry["seconds"])
        try:
            # Mapped anew at each read: a reader may have written into the pages of the last one.
            data = np.memmap(self._file, np.uint8, "c", entry["offset"], (entry["bytes"],))
        except ValueError as error:  # it is shorter than when it was opened, and to touch what is missing would kill
            raise _Damaged from error
        if zlib.crc32(data) != entry["crc32"]:
            raise _Damaged
        return CachedTensor(torch.from_numpy(data).view(dtype).as_strided(shape, strides), entry["seconds"])

    def close(self, remove: bool = False) -> None:
        _close(self._file, self._path if remove else None)

    def _touch(self) -> None:
        """Once each time it is opened: eviction goes by when a file was last used."""
        if not self._used:
            self._used = True
            with contextlib.suppress(OSError):  # a folder that may only be read
                os.utime(self._file.fileno())


class _Draft:
    """A file in the making, under a name of its own, and locked as long as its process lives.

    From the start it is as long as it may become, so that others count what it will take.
    """

    def __init__(self, path: Path, label: _Label, passes: int, size: int):
        """Raises `OSError`."""
        self.path, self.label, self._passes = path, label, passes
        self._temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_DRAFT}")
        self._entries: list[dict[str, Any]] = []
        self._end = 0
        self._file = FileIO(self._temporary, "x")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(size)
        except BaseException:
            self.discard()
            raise

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def next(self) -> int:
        """The pass that it goes on with."""
        return self.label.first + len(self)

    @property
    def complete(self) -> bool:
        return len(self) == self._passes

    def add(self, tensor: Tensor, seconds: float) -> None:
        data, strides = _to_bytes(tensor)
        self._write(data, self._end)
        self._entries.append(
            {
                "offset": self._end,
                "bytes": len(data),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "strides": strides,
                "crc32": zlib.crc32(data),
                "seconds": float(seconds),
            }
        )
        self._end = _aligned(self._end + len(data))

    def finish(self) -> None:
        """Write the index. Raises `OSError`."""
        index = json.dumps({"label": self.label, "passes": self._entries}, separators=(",", ":")).encode()
        self._write(index + _END.pack(_MARK, zlib.crc32(index), len(index)), self._end)
        self._file.truncate(self._end + len(index) + _END.size)

    def publish(self) -> None:
        """Raises `OSError`."""
        os.replace(self._temporary, self.path)
        self._file.close()

    def discard(self) -> None:
        """Remove it, unless it was published."""
        with contextlib.suppress(OSError):
            self._temporary.unlink()
            self._file.truncate(0)  # a forked data-loading worker may hold it open
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, data: bytes | np.ndarray, offset: int) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[written:], offset + written


def _holds(path: Path, label: _Label, passes: int) -> bool:
    """Whether the file is there with that many passes, as far as its index tells."""
    file = _File.open(path, label)
    if file is None:
        return False
    file.close()
    return len(file) >= passes


def _read_index(file: FileIO) -> dict[str, Any]:
    """Raises `_Damaged`, and `OSError`."""
    descriptor = file.fileno()
    end = os.fstat(descriptor).st_size - _END.size
    if end < 0:
        raise _Damaged
    mark, checksum, length = _END.unpack(_exactly(os.pread(descriptor, _END.size, end), _END.size))
    if mark != _MARK or length > end:
        raise _Damaged
    index = _exactly(os.pread(descriptor, length, end - length), length)
    if zlib.crc32(index) != checksum:
        raise _Damaged
    return json.loads(index)


def _exactly(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise _Damaged
    return data


def _close(file: FileIO, remove: Path | None = None) -> None:
    """Close `file`, and remove it from the path `remove`, unless another has come in its place."""
    with contextlib.suppress(OSError), file:
        if remove is not None and os.path.samestat(os.fstat(file.fileno()), os.stat(remove)):
            remove.unlink()


def _target(draft: Path) -> Path:
    """The file that a draft is to become."""
    return draft.with_suffix("").with_suffix("")


def _remove_dead(draft: Path) -> bool:
    """Remove the draft if no process holds it; whether it is gone. The folder is locked, so none is just beginning."""
    try:
        descriptor = os.open(draft, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:  # of another user
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises `OSError` where the disk has no locks, or another process does not let go."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise OSError(errno.EAGAIN, "another process does not let go of the folder") from error
                time.sleep(0.005)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile shares it
    finally:
        os.close(descriptor)


def _free(folder: Path) -> float:
    """Bytes that may still be written to the disk, of which `SPARE` are left to others."""
    disk = os.statvfs(folder)
    if not disk.f_blocks:  # one that does not say
        return math.inf
    return disk.f_bavail * disk.f_frsize - min(SPARE, disk.f_blocks * disk.f_frsize // 20)


def _to_bytes(tensor: Tensor) -> tuple[np.ndarray, list[int]]:
    """A tensor's bytes as they lie in memory, uint8 [N], and its strides."""
    tensor = tensor.detach()
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if not tensor.permute(order).is_contiguous():
        tensor, order = tensor.contiguous(), list(range(tensor.dim()))
    strides = list(tensor.stride())
    return tensor.permute(order).reshape(-1).view(torch.uint8).cpu().numpy(), strides


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
