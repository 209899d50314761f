"""Text for people: lists, durations, one line of a long message, the cause of an exception, URLs without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import parse_qsl, unquote

_SECRET_KEYS = re.compile(r"pass|pwd|token|secret|key|sig", re.IGNORECASE)
_LONGEST_LINE = 200  # characters
_HIDDEN = "***"


def one_line(text: str) -> str:
    """The text without line breaks, cut to 200 characters."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE - 1]}…"


def list_some(names: Sequence[str], limit: int = 3) -> str:
    """The first `limit` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 image`, `2 images`; `plural` where it is not the noun with an s."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def duration(seconds: float) -> str:
    """`2 h 05 min`, `5 min 07 s` or `7 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def describe(error: BaseException) -> str:
    """Class and message of an exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and its causes, the innermost last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def innermost_reason(error: BaseException, url: str = "") -> str:
    """The innermost cause in one line, without the messages that libraries wrap around it.

    `url` and its secrets are hidden in it.
    """
    *_, innermost = causes(error)
    text = str(innermost) or type(innermost).__name__
    if url:
        text = text.replace(url, safe_url(url))
        for secret in _secrets(url):
            text = text.replace(secret, _HIDDEN)
    return one_line(text)


def safe_url(url: str) -> str:
    """Scheme, host, port and path of a URL: what may be printed or stored.

    User, password, query and fragment are left out, also where the password has characters that a URL would quote.
    Where the end of the password is ambiguous, only the scheme remains. Text that is not a URL is returned unchanged.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url.partition("?")[0]
    if rest.startswith("/"):  # a file; its path may have any character
        return f"{scheme}://{rest.partition('?')[0]}"
    end = _end_of_path(rest)
    if "@" in rest[end:]:
        return f"{scheme}://{_HIDDEN}"
    return f"{scheme}://{rest[:end].rpartition('@')[2]}"


def _end_of_path(rest: str) -> int:
    found = re.search(r"[?#]", rest)
    return found.start() if found else len(rest)


def _secrets(url: str) -> set[str]:
    """The password, and the values of query keys such as `token`; quoted and unquoted."""
    rest = url.partition("://")[2]
    password = rest.rpartition("@")[0].partition(":")[2]
    values = [value for key, value in parse_qsl(rest[_end_of_path(rest) + 1 :]) if _SECRET_KEYS.search(key)]
    return {text for secret in (password, *values) for text in (secret, unquote(secret)) if text}
