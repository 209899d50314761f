"""Text for people: no secret of a URL, one line of a long cause."""

from __future__ import annotations

import pytest

from harness.util.text import innermost_reason, safe_url


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("http://tracking.example:5000/path", "http://tracking.example:5000/path"),
        ("https://me:secret@tracking.example/path", "https://tracking.example/path"),
        ("https://tracking.example/path?token=secret", "https://tracking.example/path"),
        ("https://tracking.example/path#secret", "https://tracking.example/path"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db"),
        ("postgresql+psycopg://me:se/cr@et@host:5432/db", "postgresql+psycopg://host:5432/db"),
        ("postgresql://me:p?secret@host/db", "postgresql://***"),
        ("postgresql+psycopg://me:secret@/db?host=/run", "postgresql+psycopg:///db"),
        ("sqlite:////home/me@here/my #runs/mlflow.db", "sqlite:////home/me@here/my #runs/mlflow.db"),
        ("sqlite:////runs/mlflow.db?key=secret", "sqlite:////runs/mlflow.db"),
        ("journal:/runs/search.log", "journal:/runs/search.log"),
        ("off", "off"),
    ],
)
def test_safe_url_has_no_secret(url: str, safe: str) -> None:
    assert safe_url(url) == safe


def test_innermost_reason_is_one_line_without_secrets() -> None:
    url = "postgresql://me:a%2Fsecret@host/db?token=hidden"
    try:
        try:
            raise OSError(f"cannot connect\nto {url} with a/secret and hidden")
        except OSError as error:
            raise RuntimeError("wrapped") from error
    except RuntimeError as error:
        assert innermost_reason(error, url) == "cannot connect to postgresql://host/db with *** and ***"


def test_long_reason_is_cut() -> None:
    assert len(innermost_reason(ValueError("x" * 1000))) == 200
