"""A table of cells with marks, and its files: Markdown and LaTeX for people, CSV for machines.

Names, reasons and labels come from files of others and are inert in each format: a class called `=cmd()`, `<script>`
or `\\input{...}` stays text.
"""

from __future__ import annotations

import csv
import html
import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd

from harness.util.files import atomically

ColumnKind = Literal["text", "number"]
Mark = Literal["best", "second", "better", "worse", "same"]


@dataclass(frozen=True)
class TableCell:
    """Text, its mark, and the letters of its footnotes."""

    text: str
    kind: ColumnKind = "number"
    mark: Mark | None = None
    notes: str = ""


@dataclass(frozen=True)
class Table:
    name: str
    """Of its files."""
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    caption: str = ""
    footnotes: Sequence[str] = ()


@dataclass
class Footnotes:
    """Texts by letter; equal texts share a letter."""

    texts: list[str] = field(default_factory=list)

    def letter(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        index, letters = self.texts.index(text), ""
        while index >= 0:
            index, letter = divmod(index, 26)
            letters, index = string.ascii_lowercase[letter] + letters, index - 1
        return letters

    def lines(self) -> list[str]:
        return [f"{self.letter(text)}: {text}" for text in self.texts]


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown, with its title, caption and footnotes."""
    kinds = [cell.kind for cell in table.rows[0]] if table.rows else ["text"] * len(table.header)
    lines = [
        f"### {_markdown_text(table.title)}",
        "",
        _markdown_row(map(_markdown_text, table.header)),
        _markdown_row("---" if kind == "text" else "---:" for kind in kinds),
        *(_markdown_row(map(_markdown_cell, row)) for row in table.rows),
    ]
    for text in (table.caption, *table.footnotes):
        lines += ["", _markdown_text(text)] if text else []
    return "\n".join(lines) + "\n"


def markdown_list(texts: Iterable[str]) -> str:
    return "".join(f"- {_markdown_text(text)}\n" for text in texts)


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: TableCell) -> str:
    text = _markdown_text(cell.text)
    if text and cell.mark is not None:
        text = f"<ins>{text}</ins>" if cell.mark == "second" else f"**{text}**"
    return text + (f"<sup>{cell.notes}</sup>" if cell.notes else "")


def _markdown_text(text: str) -> str:
    """Special characters are escaped; `<`, `>` and `&` become entities; addresses do not become links."""
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(_one_line(text), quote=False))
    return escaped.replace("://", r":\//")


def latex(table: Table) -> str:
    """A `table` of booktabs, to be pasted or `\\input`. What follows a heading's last comma gets a line of its own."""
    kinds = [cell.kind for cell in table.rows[0]] if table.rows else ["text"] * len(table.header)
    headings = [name.rpartition(", ")[::2] if ", " in name else (name, "") for name in table.header]
    lines = [
        r"% needs \usepackage{booktabs}, \usepackage{graphicx} and, for accents, \usepackage[T1]{fontenc}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex_text(table.title)}.{' ' if table.caption else ''}{_latex_text(table.caption)}}}",
        r"\smallskip",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{''.join('l' if kind == 'text' else 'r' for kind in kinds)}}}",
        r"\toprule",
        *(_latex_row(map(_latex_text, line)) for line in zip(*headings, strict=True) if any(line)),
        r"\midrule",
        *(_latex_row(map(_latex_cell, row)) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\raggedright\footnotesize {_latex_text(note)}" for note in table.footnotes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Iterable[str]) -> str:
    # A row that begins with [ would be read as the argument of the \\ before it.
    return "{}" + " & ".join(cells) + r" \\"


def _latex_cell(cell: TableCell) -> str:
    text = _latex_text(cell.text)
    if cell.mark is not None:
        text = rf"\underline{{{text}}}" if cell.mark == "second" else rf"\textbf{{{text}}}"
    return text + (rf"\textsuperscript{{{cell.notes}}}" if cell.notes else "")


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\char34{}", "`": r"\textasciigrave{}", "±": r"$\pm$", "–": "--", "−": "$-$",
    "×": r"$\times$", "≈": r"$\approx$", "τ": r"$\tau$", "…": r"\ldots{}",
}  # fmt: skip


def _latex_text(text: str) -> str:
    """Replace characters outside of ASCII and Latin-1 letters, at which pdflatex stops, by their code point.

    Ligatures such as `--` are broken up.
    """
    parted = re.sub(r"([-,'])(?=\1)", "\\1\0", unicodedata.normalize("NFC", _one_line(text)))
    return "".join("{}" if character == "\0" else _latex_character(character) for character in parted)


def _latex_character(character: str) -> str:
    known = character.isascii() or ("À" <= character <= "ÿ" and character.isalpha())
    return _LATEX.get(character, character if known else f"[U+{ord(character):04X}]")


def _one_line(text: str) -> str:
    """Control characters and line breaks become spaces, and lone surrogates a mark: no format can represent them."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join("".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text).split())


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Exact numbers; texts are quoted, and formulas are disarmed by a leading apostrophe.

    By OWASP's page on CSV injection: `=`, `+`, `-`, `@`, their wide forms, tab and line breaks at the beginning.
    """
    safe = frame.copy()
    for column in frame.columns:
        if not pd.api.types.is_numeric_dtype(frame[column]):
            safe[column] = [_inert(value) for value in frame[column]]
    with atomically(path) as temporary:
        safe.to_csv(temporary, index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC, errors="replace")


def _inert(value: object) -> object:
    if not isinstance(value, str):
        return value
    return f"'{value}" if value.lstrip(" ").startswith(tuple("=+-@＝＋－＠\t\r\n")) else value
