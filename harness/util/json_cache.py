"""A cache of JSON values on disk. Its files may be deleted at any time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.util.files import digest, write_json


def cached_json(cache: Path, kind: str, key: Any, compute: Callable[[], Any]) -> Any:
    """The JSON value of `compute()`, kept in the folder `cache` under (kind, key).

    A pure cache: its files may be deleted at any time, and one that cannot be read or written is computed again.
    """
    value = read_cached_json(cache, kind, key)
    if value is None:
        value = compute()
        with contextlib.suppress(OSError):
            write_json(_path(cache, kind, key), {"key": key, "value": value})
    return value


def read_cached_json(cache: Path, kind: str, key: Any) -> Any:
    """What `cached_json` keeps under (kind, key); None where it keeps nothing."""
    try:
        return json.loads(_path(cache, kind, key).read_text(encoding="utf-8"))["value"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _path(cache: Path, kind: str, key: Any) -> Path:
    return cache / f"{kind}-{digest(key)[:24]}.json"
