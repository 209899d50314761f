"""A cache of JSON values on disk. Its files may be deleted at any time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.util.files import digest, write_json


def cached_json(cache: Path, kind: str, key: Any, compute: Callable[[], Any]) -> Any:
    """The JSON value of `compute()`, cached in the folder `cache` under (kind, key).

    A value whose file cannot be read, was changed or has another key is computed again; a file that cannot be written
    is skipped.
    """
    value = read_cached_json(cache, kind, key)
    if value is None:
        value = compute()
        with contextlib.suppress(OSError):
            entry = {"key": key, "value": value}
            write_json(_path(cache, kind, key), entry | {"digest": digest(entry)})
    return value


def read_cached_json(cache: Path, kind: str, key: Any) -> Any:
    """The value that `cached_json` has cached under (kind, key); None if there is none."""
    try:
        entry = json.loads(_path(cache, kind, key).read_bytes())
        fields = {"key": entry["key"], "value": entry["value"]}
        return entry["value"] if entry["digest"] == digest(fields) and digest(entry["key"]) == digest(key) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _path(cache: Path, kind: str, key: Any) -> Path:
    return cache / f"{kind}-{digest(key)[:24]}.json"
