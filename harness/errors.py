"""Errors that a user can fix, each as one line: where the value is, the value, the problem, and a hint.

Lower layers raise `UserError` with a field and its value; they do not know flags or files. The code that read the value
adds its location: the reader of a file with `located`, the command line with `UserError.for_command_line`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_FLAGS = {"settings": "set"}
"""Fields whose flag has another name."""
_TYPES = ("bool", "int", "float", "str")
_LONGEST = 120
_LONGEST_TEXT, _LONGEST_LINE = 500, 2000


class UserError(Exception):
    """An error that the user can fix. The command line prints it without a traceback and exits with 2.

    `field` is the name of the wrong field (`method`, `budget`, or nested: `settings.lr`), `value` its value (None if
    there is none to show), `hint` what to do. `str()` is one line: `method spn: no such method; did you mean spm?`
    """

    def __init__(self, problem: str, *, field: str | None = None, value: object = None, hint: str | None = None):
        super().__init__(problem)
        self.problem = problem
        self.field = field
        self.value = value
        self.hint = hint
        self.source: str | None = None
        """The file that the value came from, once its reader has set it."""

    def at(self, source: object = None, *, key: str | None = None, under: str | None = None) -> UserError:
        """Add the file `source` that holds the value; returns itself.

        `key` replaces the field with its name in the file; `under` is prepended to the field. An error that already has
        a file is not changed: the innermost reader knows best.
        """
        if self.source is None:
            if key is not None:
                self.field = key
            if under is not None:
                self.field = under if self.field is None else f"{under}.{self.field}"
            self.source = None if source is None else str(source)
        return self

    def __str__(self) -> str:
        value = None if self.value is None else shown(self.value)
        if self.source is None:
            where = " ".join(part for part in (self._field, value) if part is not None)
            parts = [where] if where else []
        else:
            parts = [part for part in (shown(self.source), self._field, value) if part is not None]
        return _line(": ".join([*parts, self.problem]) + (f"; {self.hint}" if self.hint else ""))

    def for_command_line(self) -> str:
        """As `str()`, with the flag in place of the field where no file has the value: `--method spn: no such...`."""
        if self.source is not None or self._field is None:
            return str(self)
        field, _, name = self._field.partition(".")
        flag = "--" + _FLAGS.get(field, field).replace("_", "-")
        value = "" if self.value is None else shown(self.value)
        given = f"{name}={value}".rstrip("=") if name else value
        hint = f"; {self.hint}" if self.hint else ""
        return _line(f"{flag} {given}".rstrip() + f": {self.problem}{hint}")

    @property
    def _field(self) -> str | None:
        return None if self.field is None else self.field[:_LONGEST]


@contextmanager
def located(source: object = None, *, key: str | None = None, under: str | None = None) -> Iterator[None]:
    """Errors raised inside name the file `source`; see `UserError.at`."""
    try:
        yield
    except UserError as error:
        error.at(source, key=key, under=under)
        raise


class InvalidField(ValueError):
    """Raised by a validator of several fields, so that `invalid` can name the wrong one."""

    def __init__(self, field: str, problem: str, value: object = None):
        super().__init__(problem)
        self.field = field
        self.value = value


_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    "string_type": "text",
    "dict_type": "a mapping",
}
"""pydantic's kind of error -> what is expected instead."""


def invalid(error: ValidationError, known: Iterable[str] = ()) -> UserError:
    """The first problem of a pydantic error; `known` are the names to choose from where a field does not exist."""
    problems = error.errors()
    # A misspelt field is also a missing one: the name that was written says more.
    first = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    path = list(first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidField):
        return UserError(str(cause), field=_path([*path, cause.field]), value=cause.value)
    if first["type"] == "extra_forbidden":
        return UserError("no such field", field=_path(path), hint=did_you_mean(str(path[-1]), known))
    message = re.sub(" or instance of \\w+$", "", first["msg"].removeprefix("Value error, "))
    if first["type"] == "missing" and path and isinstance(path[-1], int):
        return UserError(f"has length {path[-1]}; expected more", field=_path(path[:-1]))
    if first["type"] == "missing":
        return UserError("is missing", field=_path(path))
    if first["type"] in _EXPECTED:
        message = f"expected {_EXPECTED[first['type']]}"
    if first["type"] in ("too_short", "too_long"):
        context = first["ctx"]
        bound, limit = ("at least", "min_length") if first["type"] == "too_short" else ("at most", "max_length")
        message = f"has length {context['actual_length']}; expected {bound} {context[limit]}"
    if first["type"] != "value_error":
        message = message[0].lower() + message[1:]
    if path and path[-1] == "[key]":  # of a mapping, in pydantic's words
        path, message = path[:-1], "expected a name"
    elif path and _is_type(path[-1]):  # pydantic reports an error for each type of a union
        types = [str(p["loc"][-1]) for p in problems if list(p["loc"][:-1]) == path[:-1]]
        path, message = path[:-1], f"expected {' or '.join(t.partition('[')[0] for t in types)}"
    if first["type"] == "value_error" and not path:
        return UserError(message)
    value = "null" if first["input"] is None else first["input"]
    return UserError(message, field=_path(path), value=value)


def printable(text: str) -> str:
    r"""The text on one line: line breaks, escape codes and lone surrogates as `\n`, `\x1b` and `\ud800`."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _line(text: str) -> str:
    """Printable, and no longer than what a terminal shows at once."""
    half = _LONGEST_LINE // 2
    return printable(text if len(text) <= _LONGEST_LINE else f"{text[:half]} ... {text[-half:]}")


def _is_type(part: str | int) -> bool:
    return isinstance(part, str) and (part in _TYPES or "[" in part)


def _path(parts: Iterable[str | int]) -> str:
    """`methods[2].settings.lr`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def shown(value: object) -> str:
    """A value on one line: text as it is, other values in at most `_LONGEST` characters."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        value = value if len(value) <= _LONGEST_TEXT else f"{value[:_LONGEST]}... ({len(value)} characters)"
        return value if value and value.isprintable() else repr(value)
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names that are similar, the most similar first."""
    return difflib.get_close_matches(name, sorted(known), n=limit, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A hint that offers the nearest of the known names, or lists them where there are few."""
    known = sorted(known)
    if near := nearest(name, known, limit):
        return f"did you mean {' or '.join(near)}?"
    if len(known) <= 30:
        return f"known: {', '.join(known) or 'none'}"
    return f"none of {len(known)} known names is similar"
