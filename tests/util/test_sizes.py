"""An amount of disk is read as it is meant, or refused in a line that says how to write one."""

from __future__ import annotations

import pytest

from harness.errors import UserError
from harness.util.sizes import CACHE_SIZE, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        ("7 B", 7),
        ("8GB", 8_000_000_000),
        ("8GiB", 8 * 2**30),
        ("500 MB", 500_000_000),
        (" 1.5mib ", 3 * 2**19),
        (".5kb", 500),
        ("1KiB", 1024),
        ("2TB", 2 * 10**12),
        ("2TiB", 2**41),
        ("0GB", 0),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str, size: int) -> None:
    assert parse_size(text, "--cache-size") == size


def test_the_default_is_one() -> None:
    assert parse_size(CACHE_SIZE, "--cache-size") == 8 * 10**9


@pytest.mark.parametrize(
    "text", ["", "GB", "8XB", "8G", "-1GB", "1e9", "8 GB GB", "1.GB", "1,5GB", "all", "8²GB", "٨GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_size(text, "--cache-size")
    assert str(refusal.value) == (
        f"--cache-size {text}: not a size; give a number and a unit, such as 8GB or 500MiB, or 0"
    )
