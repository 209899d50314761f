"""Options as dataclass fields: a field holds what the command line needs, so that each option is defined once.

`harness/cli/options.py` makes flags from them; everyone else sees an ordinary dataclass.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

from harness.errors import UserError


def option(
    default: Any,
    help: str,
    *,
    type: Any = None,
    flags: tuple[str, ...] = (),
    env: str | None = None,
    metavar: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    read: Callable[[str], Any] | None = None,
    shown_default: str | None = None,
    hidden: bool = False,
    on_command_line: bool = True,
) -> Any:
    """A dataclass field with its help text and what else the command line needs to know.

    `type` is the type on the command line where it is not the field's own. `flags` default to `--name-with-dashes`.
    A number is at least `minimum`, at most `maximum` and more than `above`. `read` turns the text into the value and
    raises `ValueError` with what is wrong; `shown_default` is the default as such a text. An option that is not
    `on_command_line` is set by a launcher, never by a user. A default of type dict is copied for each object.
    """
    metadata = {
        "help": help,
        "type": type,
        "flags": flags,
        "env": env,
        "metavar": metavar,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "read": read,
        "shown_default": shown_default,
        "hidden": hidden,
        "on_command_line": on_command_line,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def environment_number(name: str, default: int) -> int:
    """The whole number in an environment variable, as `torchrun` and OpenMP read it. Raises `UserError`."""
    text = os.environ.get(name, "").split(",")[0].strip()  # OpenMP: one number for each level
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name}={text}: not a whole number; set it to one, or unset it")
    return int(text or default)


def read_size(text: str) -> int:
    """Bytes of `8GB`, `500MiB` or `0`: KB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB of 1024; no unit is bytes.

    Raises `ValueError`.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError  # here: reading `--help` does not need it

    problem = "invalid size; give a number and a unit, such as 8GB or 500MiB, or 0"
    if not re.fullmatch(r"\s*\d*\.?\d+\s*[a-zA-Z]*\s*", text, re.ASCII):  # pydantic reads 1,5GB as 1 byte
        raise ValueError(problem)
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise ValueError(problem) from error
