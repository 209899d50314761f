"""Writing files so that a reader sees the whole of one or nothing, and hashing them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`.

    On any exception (a full disk, Ctrl-C) the temporary file is removed and `path` is what it was before. A full disk
    is an `OSError` of `ENOSPC` that names `path`, whatever the library that was writing made of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        full = isinstance(error, Exception) and _disk_is_full(error, temporary)
        with contextlib.suppress(OSError):
            os.truncate(temporary, 0)  # torch's writer is still open, and would keep the disk full
        temporary.unlink(missing_ok=True)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def is_disk_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether no room was left, on the disk or in the user's quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _disk_is_full(error: Exception, temporary: Path) -> bool:
    """torch and safetensors report a full disk as errors of their own kind; then the disk itself is asked."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    try:
        left = os.statvfs(temporary)
    except OSError:
        return False
    return left.f_bavail == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
