"""Amounts of disk as users write them: `8GB`, `500 MiB`, `0`."""

from __future__ import annotations

import re

from harness.errors import UserError

CACHE_SIZE = "8GB"
"""What frozen features may take on disk where nobody says (`--cache-size`)."""

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{infix}b": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}


def parse_size(text: str, said: str) -> int:
    """Bytes of a number with a unit: KB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB of 1024, none is bytes.

    Raises `UserError`, which begins with `said`: the option that `text` was given to, such as `--cache-size`.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    if found is None or found[2].lower() not in _UNITS:
        raise UserError(f"{said} {text}: not a size; give a number and a unit, such as 8GB or 500MiB, or 0")
    return round(float(found[1]) * _UNITS[found[2].lower()])
