"""The loader of YAML: what is refused in one line, and what stays text."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import UserError
from harness.util.files import read_yaml, read_yaml_file

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{own}: &{own} [{', '.join([f'*{last}'] * 9)}]\n" for last, own in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("power: .inf", "line 1: power: .inf is not a finite number"),
        ("a:\n  - [1, -.INF]", "line 2: a: -.INF is not a finite number"),
        ("1: .nan", "line 1: 1: .nan is not a finite number"),
        ("steps: " + "9" * 5000, "line 1: steps: a number of 5000 characters; use at most 18"),
        ("{99999999999999999999: a}", "line 1: a number of 20 characters; use at most 18"),
        ("a: 1\nb: 2\na: 3", "line 3: a appears twice"),
        ("a: {b: {c: 1, c: 2}}", "line 1: c appears twice"),
        ("[" * 3000 + "]" * 3000, "line 1: nested deeper than 50 levels"),
        ("{a: " * 3000 + "1" + "}" * 3000, "line 1: nested deeper than 50 levels"),
        (BOMB, "line 6: more than 200,000 values, with what aliases stand for"),
        ("a: &a [*a]", "line 1: *a refers to itself"),
        ('a: "b\\0c"', "line 1: a: has the control character '\\x00'"),
        ('a: "\\e[31mred"', "line 1: a: has the control character '\\x1b'"),
        ('"a\\nb": 1', "line 1: key 'a\\nb' has a line break or another control character"),
        ("{[1]: 2}", "line 1: a list or mapping as a key"),
        ("a: !!timestamp 2024-13-45", "month must be in 1..12"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
        ("a: 1\n---\na: 2", "not YAML: expected a single document"),
        ("a: !!float many", "could not convert string to float"),
    ],
)
def test_yaml_beyond_the_limits_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml_file(file)
    assert str(caught.value).startswith(f"{file}: {problem}")


def test_large_file_is_refused_without_reading_it_all() -> None:
    with pytest.raises(UserError, match=r"^/dev/zero: larger than 4 MB$"):
        read_yaml_file(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-01-31", "2024-01-31"),
        ("8:32", "8:32"),
        ("1:30.5", "1:30.5"),
        ("[12, -3, 0x1f, 1_000]", [12, -3, 31, 1000]),
        ("[0.5, .5e+2, 1.0e-3]", [0.5, 50.0, 1e-3]),
        ("[yes, no, ~, 1e-3, a]", [True, False, None, "1e-3", "a"]),
        ("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}", {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}),
        ("", None),
    ],
)
def test_value_is_what_the_text_shows(text: str, value: object) -> None:
    assert read_yaml(text) == value
