"""Files: written atomically, hashed, and read as YAML with errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from harness.errors import UserError


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success it is flushed to disk and renamed to `path`.

    On any exception (a full disk, Ctrl-C) the temporary file is removed and `path` is unchanged. A full disk is raised
    as an `OSError` of `ENOSPC` that names `path`, even if the writing library raised an exception of its own.
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
            os.truncate(temporary, 0)  # torch's writer still has it open, which would keep the disk full
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


def read_yaml(text: str) -> Any:
    """The value of YAML text, within the limits of `strict_yaml`. Raises `ValueError` that says what is wrong."""
    import yaml  # here: the command line's help needs this module, but not yaml

    from harness.util import strict_yaml

    try:
        return strict_yaml.load(text)
    except strict_yaml.Unacceptable:
        raise
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


def read_yaml_file(path: Path, field: str | None = None) -> Any:
    """The content of a YAML file.

    Raises `UserError` of `field` if the file cannot be opened, and of the file if it is not YAML or beyond the limits.
    """
    from harness.util.strict_yaml import LARGEST_FILE

    try:
        with path.open("rb") as handle:
            content = handle.read(LARGEST_FILE + 1)
        return read_yaml(content.decode("utf-8"))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise (UserError(reason, field=field, value=path) if field else UserError(reason).at(path)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"not YAML: {error}").at(path) from error
    except ValueError as error:
        raise UserError(str(error)).at(path) from error


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite database. Raises `UserError` of `runs` for a path that a URL would cut off."""
    absolute = path.absolute().as_posix()
    if "?" in absolute:
        hint = "choose a folder without it, or name other databases with --tracking and --storage"
        problem = "its path has a question mark, where the URL of a database ends"
        raise UserError(problem, field="runs", value=path.parent, hint=hint)
    return f"sqlite:///{absolute}"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def is_unchanged(path: Path, digests: Mapping[str, str]) -> bool:
    """Whether a file has the SHA-256 recorded under its name; true where none is."""
    try:
        return path.name not in digests or sha256(path) == digests[path.name]
    except OSError:
        return False


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def is_disk_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether the error says that the disk, or the user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _disk_is_full(error: Exception, temporary: Path) -> bool:
    """torch and safetensors raise errors of their own on a full disk; for these, ask the file system."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    try:
        return os.statvfs(temporary).f_bavail == 0
    except OSError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
