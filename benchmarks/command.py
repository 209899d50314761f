"""What the two commands share: lists of names, and a file of tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError, did_you_mean


def chosen(flag: str, given: str | None, known: Sequence[str]) -> list[str]:
    """The names in a comma-separated list. Raises `UserError` for an unknown one."""
    names = given.split(",") if given else []
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name}: no such name; {did_you_mean(name, known)}")
    return names


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--markdown {path}: {os.strerror(error.errno or 0)}; name a writable file") from error
