"""Markdown from plain text and rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def escaped(text: str) -> str:
    """Plain text as Markdown that shows the same; what is in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") and len(part) > 1 else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    return re.sub(r"([\\*_\[\]])", r"\\\1", text)


def code(text: str) -> str:
    """Text in code style, within a table too."""
    return f"`{text}`" if text else ""


def plain_value(value: Any) -> str:
    """A value as YAML and `--set` take it."""
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; columns without content are left out."""
    used = [column for column in range(len(headings)) if any(row[column] for row in rows)]
    lines = [[headings[column] for column in used], ["---"] * len(used)]
    lines += [[" ".join(row[column].split()) for column in used] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
