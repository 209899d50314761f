"""Checks a folder before a command starts, so that a wrong path is a one-line error and not a late traceback."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError
from harness.util.files import is_disk_full


def check_readable(flag: str, folder: Path) -> None:
    """Check that the folder can be listed or does not exist yet. Raises `UserError`."""
    existing = _nearest(flag, folder)
    if existing == folder and not os.access(folder, os.R_OK | os.X_OK):
        raise _error(flag, folder, "Permission denied")


def check_writable(flag: str, folder: Path) -> None:
    """Check that the folder can be written to or created. Creates nothing. Raises `UserError`."""
    existing = _nearest(flag, folder)
    if not os.access(existing, os.W_OK | os.X_OK):
        where = "" if existing == folder else f" for {existing}"
        read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        raise _error(flag, folder, ("Read-only file system" if read_only else "Permission denied") + where)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns the `OSError` of a file that cannot be written into a `UserError`; that of a full disk is not changed."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{what}: {os.strerror(error.errno or 0)}; choose another file") from error


def _nearest(flag: str, folder: Path) -> Path:
    """The folder, or the first folder above it that exists."""
    for path in (folder, *folder.absolute().parents):
        try:
            found = os.stat(path)
        except FileNotFoundError as error:
            if path.is_symlink():
                raise _error(flag, folder, f"{path} is a broken link") from error
        except OSError as error:
            raise _error(flag, folder, os.strerror(error.errno or 0)) from error
        else:
            if not stat.S_ISDIR(found.st_mode):
                raise _error(flag, folder, "Not a directory")
            return path
    return Path(folder.anchor or ".")


def _error(flag: str, folder: Path, reason: str) -> UserError:
    return UserError(f"{flag} {folder}: {reason}; choose another folder")
