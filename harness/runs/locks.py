"""Who may execute a run: at most one process at a time, on one machine or on many that share a disk.

Two layers. A lock of the operating system (`flock`) decides wherever the disk honours it: it goes with its process, so
neither a kill nor a stopped process nor a wrong clock can leave it in doubt. Beside it lies a lease, for disks that
keep such locks to each machine: its holder beats in it, and another machine takes it over only when it has seen no beat
for `LEASE` seconds of its own monotonic clock. Who wakes up after that finds its lease gone, and leaves without a word.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError

LEASE = float(os.environ.get("HARNESS_LEASE", "60"))
"""Seconds without a beat after which another machine takes a claim over."""

_BEATS = 6
"""How many times in `LEASE` seconds a holder beats."""

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class AlreadyLocked(UserError):
    """Another process holds the claim. `lock_owner` says which, as far as it is known."""

    def __init__(self, name: str, lock_owner: str):
        super().__init__(f"run {name} is being executed by {lock_owner}; wait for it or stop it")
        self.lock_owner = lock_owner


class LockLost(UserError):
    """This process was not heard of for so long that another machine took its run over."""


class RunLock:
    """One held claim. `check` before whatever must not be written twice."""

    def __init__(self, lock: int, lease: Path, descriptor: int, text: str):
        self._lock, self._lease, self._descriptor, self._text = lock, lease, descriptor, text
        self._released = threading.Event()
        self._beats = threading.Thread(target=self._beat, name=f"lease-{lease.stem}", daemon=True)
        self._beats.start()

    def check(self) -> None:
        """Raises `LockLost`."""
        if not self._is_ours():
            raise LockLost(f"{self._lease.stem} was taken over by another machine; this process leaves it to that one")

    def release(self) -> None:
        self._released.set()
        self._beats.join()
        if self._is_ours():
            self._lease.unlink(missing_ok=True)
        _close(self._descriptor, self._lock)

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._lease), os.fstat(self._descriptor))
        except OSError:
            return False

    def _beat(self) -> None:
        """Into the open file, wherever its name is by now: a lease that was taken over is never written to."""
        count = 0
        while not self._released.wait(LEASE / _BEATS):
            count += 1
            with contextlib.suppress(OSError):  # a disk that is away for a while
                os.pwrite(self._descriptor, _content(self._text, count), 0)


@contextlib.contextmanager
def lock(folder: Path, name: str) -> Iterator[RunLock]:
    """Hold the claim `name`, whose files are in `folder`.

    Raises `AlreadyLocked` where another process holds it, and `UserError` where `folder` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"--runs {folder.parent}: cannot be written: {reason}; choose another folder") from error
    _open_here.add(lock)
    try:
        lease = folder / f"{name}.lease"
        _lock(lock, lease, name)
        held = _take(lock, lease, name)
    except OSError as error:
        _close(lock)
        if not error.filename:  # such as of a full disk
            error.filename = str(folder.parent / name)
        raise
    except BaseException:
        _close(lock)
        raise
    try:
        yield held
    finally:
        held.release()


def lock_owner(folder: Path, name: str) -> str | None:
    """Who holds the claim, as far as this machine can see at once; None where nobody does.

    A claim of another machine is reported until it is released or taken over, as its holder may live.
    """
    lease = folder / f"{name}.lease"
    try:
        lock = os.open(folder / name, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(lease)
    except OSError:
        pass
    finally:
        os.close(lock)
    seen = _read(lease)
    return None if seen is None or _is_of_this_machine(seen) else _holder(lease)


def _lock(lock: int, lease: Path, name: str) -> None:
    """Raises `AlreadyLocked`; not for the instant in which `lock_owner` looks."""
    for last in (False, False, True):
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if last:
                raise AlreadyLocked(name, _holder(lease)) from error
            time.sleep(0.02)
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                return
            raise


def _take(lock: int, lease: Path, name: str) -> RunLock:
    """The lock is held; the lease decides about other machines."""
    text = json.dumps({"id": secrets.token_hex(8), "machine": _machine(), "pid": os.getpid()})
    seen = _read(lease)
    if seen is not None:
        if not _is_of_this_machine(seen):  # of this one's dead the lock has told
            _see_no_beat(lease, seen, name)
        _remove(lease, seen)
    # A file is made under a name of its own and linked to the lease's: that fails where another was faster, and unlike
    # O_EXCL it does so on every network disk.
    own = lease.with_suffix(f".{secrets.token_hex(8)}")
    descriptor = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.pwrite(descriptor, _content(text, 0), 0)
        os.link(own, lease)
    except FileExistsError as error:
        os.close(descriptor)
        raise AlreadyLocked(name, _holder(lease)) from error
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        own.unlink(missing_ok=True)
    _open_here.add(descriptor)
    return RunLock(lock, lease, descriptor, text)


def _see_no_beat(lease: Path, seen: bytes, name: str) -> None:
    """Watch another machine's lease for its whole length. Raises `AlreadyLocked` at the first beat."""
    end = time.monotonic() + LEASE
    while time.monotonic() < end:
        time.sleep(LEASE / _BEATS / 4)
        if _read(lease) != seen:
            raise AlreadyLocked(name, _holder(lease))


def _remove(lease: Path, seen: bytes) -> None:
    """Take a dead lease out of the way; a live one that came in its place is put back."""
    moved = lease.with_suffix(f".{secrets.token_hex(8)}")
    try:
        lease.rename(moved)
    except FileNotFoundError:
        return
    if _read(moved) != seen:
        with contextlib.suppress(FileExistsError):
            os.link(moved, lease)
    moved.unlink(missing_ok=True)


def _content(text: str, count: int) -> bytes:
    return f"{text}\n{count:012d}\n".encode()


def _read(lease: Path) -> bytes | None:
    try:
        return lease.read_bytes()
    except FileNotFoundError:
        return None


def _said(content: bytes | None) -> dict[str, object]:
    try:
        return json.loads((content or b"").split(b"\n")[0])
    except ValueError:
        return {}


def _holder(lease: Path) -> str:
    said = _said(_read(lease))
    host = str(said.get("machine", "")).partition("/")[0]
    return f"process {said['pid']} on {host}" if "pid" in said else "another process"


def _is_of_this_machine(content: bytes) -> bool:
    return _said(content).get("machine") == _machine()


def _machine() -> str:
    """A name that two machines never share, nor one before and after it was started anew."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "?"
    return f"{socket.gethostname()}/{boot}"


_open_here: set[int] = set()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        _open_here.discard(descriptor)
        os.close(descriptor)


def _drop() -> None:
    """A forked child (a data-loading worker) shares its parent's lock and would keep it alive past the parent."""
    _close(*list(_open_here))


os.register_at_fork(after_in_child=_drop)
