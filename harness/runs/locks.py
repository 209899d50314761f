"""Run locks: at most one process executes a run, on one machine or on many that share a disk.

Two layers. A lock of the operating system (`flock`, through filelock) decides wherever the disk supports it: it ends
with its process, so that it is reliable after a kill, while a process is stopped, and with a wrong clock. Next to it is
a lease file, for disks on which such locks are local to a machine: its owner renews it, and another machine takes it
over once it has seen no renewal for `lease_seconds` of its own monotonic clock. A stalled process that wakes up after
that has lost the lock, and `RunLock.check` stops it before it writes anything.

Why the lease is not filelock's `SoftFileLease` (version 4.2): it takes over only where two names can be exchanged
atomically, which NFS, SMB and other network disks refuse, so that a dead machine's lease would never end there; and it
never takes over an empty file, which a crash leaves behind.
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

from filelock import lock_descriptor

from harness.errors import UserError

_RENEWALS = 6
"""How often an owner renews its lease within `lease_seconds`."""
_ABANDONED = 7 * 24 * 3600.0
"""Seconds, by the disk's clock, after which unused files of any machine are removed."""
_LEASE, _DRAFT = ".lease", ".tmp"
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class AlreadyLocked(UserError):
    """Another process holds the lock. `lock_owner` describes it, as far as it is known."""

    def __init__(self, name: str, lock_owner: str):
        super().__init__(f"run {name} is being executed by {lock_owner}; wait for it or stop it")
        self.lock_owner = lock_owner


class LockLost(UserError):
    """This process did not renew its lease in time, and another machine took its run over."""


def lease_seconds() -> float:
    """Seconds without renewal after which another machine takes a lock over. Raises `UserError`."""
    value = os.environ.get("HARNESS_LEASE", "60")
    with contextlib.suppress(ValueError):
        if 0 < float(value) < threading.TIMEOUT_MAX:
            return float(value)
    raise UserError(f"HARNESS_LEASE={value}: not a positive number of seconds; set it to one, such as 60, or unset it")


class RunLock:
    """A lock that this process holds. Call `check` before every write."""

    def __init__(self, descriptor: int, path: Path, lease: int, owner: str, interval: float):
        """`descriptor` of the locked file at `path`, `lease` of its lease file, renewed every `interval` s."""
        self._descriptor, self._path = descriptor, path
        self._lease, self._owner, self._interval = lease, owner, interval
        self._released = threading.Event()
        self._renewals = threading.Thread(target=self._renew, name=f"lease-{path.name}", daemon=True)
        self._renewals.start()

    def check(self) -> None:
        """Raises `LockLost`."""
        if not self._is_ours():
            raise LockLost(f"run {self._path.name} was taken over by another machine; this process stops")

    def release(self) -> None:
        """Release the lock."""
        self._released.set()
        self._renewals.join()
        if self._is_ours():
            _lease_path(self._path).unlink(missing_ok=True)
        _close(self._lease, self._descriptor)

    def _is_ours(self) -> bool:
        return _is_at(self._lease, _lease_path(self._path))

    def _renew(self) -> None:
        """Write to the open file, not to its path: a lease that was taken over is never written to."""
        count = 0
        while not self._released.wait(self._interval):
            count += 1
            with contextlib.suppress(OSError):  # the disk is temporarily unavailable
                os.pwrite(self._lease, _content(self._owner, count), 0)


@contextlib.contextmanager
def lock(folder: Path, name: str) -> Iterator[RunLock]:
    """Acquire the lock `name`, whose files are in `folder`; files of ended processes are removed from it.

    Raises `AlreadyLocked` if another process holds it, and `UserError` if `folder` cannot be written.
    """
    seconds, path = lease_seconds(), folder / name
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, exact = _open_locked(path)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(f"--runs {folder.parent}: cannot be written: {reason}; choose another folder") from error
        stack.callback(_close, descriptor)
        try:
            owner = json.dumps({"id": secrets.token_hex(8), "machine": _machine(), "pid": os.getpid()})
            with contextlib.suppress(OSError):
                os.utime(descriptor)  # `_sweep` removes files that are long unused
            lease = _take_lease(path, owner, exact, seconds)
        except OSError as error:
            if not error.filename:  # for example, of a full disk
                error.filename = str(folder.parent / name)
            raise
        stack.callback(_close, lease)
        stack.callback(_lease_path(path).unlink, missing_ok=True)
        held = RunLock(descriptor, path, lease, owner, seconds / _RENEWALS)  # fails where no thread can be started
        stack.pop_all()
    try:
        with contextlib.suppress(OSError):
            _sweep(folder, name, os.fstat(lease).st_mtime)
        yield held
    finally:
        held.release()


def lock_owner(folder: Path, name: str) -> str | None:
    """The owner of the lock, as far as this machine can tell immediately; None if it is free.

    An owner on another machine is reported until it releases the lock or loses it, as it may be alive.
    """
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return _other_machine(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two callers do not see each other
    except BlockingIOError:
        return _owner(path)
    except OSError:
        return _owner(path) if _read(_lease_path(path)) is not None else None
    finally:
        os.close(descriptor)
    return _other_machine(path)


def last_renewal(folder: Path, name: str) -> bytes:
    """Bytes that change whenever the lock's owner renews its lease; empty if there is no lease."""
    return _read(_lease_path(folder / name)) or b""


def _open_locked(path: Path, attempts: int = 4) -> tuple[int, bool]:
    """The lock file, open and locked, and whether the disk has such locks. Raises `AlreadyLocked` and `OSError`."""
    for attempt in range(attempts):  # `lock_owner` and a sweep hold it briefly
        if attempt:
            time.sleep(0.02)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = lock_descriptor(descriptor, blocking=False)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                _open_here.add(descriptor)
                return descriptor, False
            os.close(descriptor)
            raise
        if locked and _is_at(descriptor, path):  # and it was not removed by a sweep in between
            _open_here.add(descriptor)
            return descriptor, True
        os.close(descriptor)
    raise AlreadyLocked(path.name, _owner(path))


def _take_lease(path: Path, owner: str, exact: bool, seconds: float) -> int:
    """Acquire the lease and return its descriptor. Raises `AlreadyLocked` and `OSError`.

    `exact`: the lock file is locked, which proves that an owner on this machine has ended.
    """
    lease = _lease_path(path)
    seen = _read(lease)
    if seen is not None:
        if not (exact and _is_of_this_machine(seen)):
            _wait_for_expiry(path, seen, seconds)
        _remove_lease(lease, seen)
    # A draft is linked to the lease's name: that fails if another machine was faster, and unlike O_EXCL it does so on
    # every network disk.
    draft = _draft_path(lease)
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.pwrite(descriptor, _content(owner, 0), 0)
        os.link(draft, lease)
    except FileExistsError as error:
        os.close(descriptor)
        raise AlreadyLocked(path.name, _owner(path)) from error
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        draft.unlink(missing_ok=True)
    _open_here.add(descriptor)
    return descriptor


def _wait_for_expiry(path: Path, seen: bytes, seconds: float) -> None:
    """Watch another machine's lease for its whole duration. Raises `AlreadyLocked` at the first renewal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(seconds / _RENEWALS / 4)
        if _read(_lease_path(path)) != seen:
            raise AlreadyLocked(path.name, _owner(path))


def _remove_lease(lease: Path, seen: bytes) -> None:
    """Remove an expired lease; restore a live one that has replaced it."""
    moved = _draft_path(lease)
    try:
        lease.rename(moved)
    except FileNotFoundError:
        return
    if _read(moved) != seen:
        with contextlib.suppress(FileExistsError):
            os.link(moved, lease)
    moved.unlink(missing_ok=True)


def _sweep(folder: Path, own: str, now: float) -> None:
    """Remove files of ended processes from `folder`, once per process. `now`: the time by the disk's clock."""
    if folder in _swept:
        return
    _swept.add(folder)
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(OSError, AlreadyLocked):
            abandoned = now - path.stat().st_mtime > _ABANDONED
            if path.suffix == _LEASE and path.stem != own:
                _remove_dead_lease(path, abandoned)
            elif abandoned and path.suffix == _DRAFT:
                path.unlink()
            elif abandoned and path.name != own and not _lease_path(path).exists():
                descriptor, exact = _open_locked(path, attempts=1)
                if exact and now - os.fstat(descriptor).st_mtime > _ABANDONED:
                    path.unlink()
                _close(descriptor)


def _remove_dead_lease(lease: Path, abandoned: bool) -> None:
    """Raises `AlreadyLocked` if its owner is alive on this machine, and `OSError`."""
    descriptor, exact = _open_locked(lease.with_suffix(""), attempts=1)
    try:
        seen = _read(lease)
        if seen is not None and (abandoned or (exact and _is_of_this_machine(seen))):
            _remove_lease(lease, seen)
    finally:
        _close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _lease_path(path: Path) -> Path:
    return path.with_name(path.name + _LEASE)


def _draft_path(lease: Path) -> Path:
    return lease.with_name(f"{lease.name}.{secrets.token_hex(8)}{_DRAFT}")


def _content(owner: str, count: int) -> bytes:
    return f"{owner}\n{count:012d}\n".encode()


def _read(lease: Path) -> bytes | None:
    try:
        return lease.read_bytes()
    except FileNotFoundError:
        return None


def _fields(content: bytes | None) -> dict[str, object]:
    """The owner in a lease file; empty if the file is damaged."""
    try:
        fields = json.loads((content or b"").split(b"\n")[0])
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _owner(path: Path) -> str:
    fields = _fields(_read(_lease_path(path)))
    host = str(fields.get("machine", "")).partition("/")[0]
    return f"process {fields['pid']} on {host}" if "pid" in fields else "another process"


def _other_machine(path: Path) -> str | None:
    """The owner in the lease, unless it was on this machine and has ended."""
    seen = _read(_lease_path(path))
    return None if seen is None or _is_of_this_machine(seen) else _owner(path)


def _is_of_this_machine(content: bytes) -> bool:
    return _fields(content).get("machine") == _machine()


def _machine() -> str:
    """A name that is unique to this machine and changes with every restart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "?"
    return f"{socket.gethostname()}/{boot}"


_swept: set[Path] = set()
_open_here: set[int] = set()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        _open_here.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    """Close the lock in a forked child (a data-loading worker), which would hold it after its parent has ended."""
    _close(*list(_open_here))


os.register_at_fork(after_in_child=_close_in_child)
