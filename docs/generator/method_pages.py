"""Every method that ships: what it adds, its source, where it departs from it, its hyperparameters."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from markup import code, escaped, plain_value, table

from harness.method import Method, methods
from studies.search.spec import declared_space

ROOT = Path(__file__).parents[2]


def methods_by_name() -> str:
    return "\n\n".join(_method(name, methods.get(name)) for name in methods.names())


def _method(name: str, method: type[Method]) -> str:
    file = Path(inspect.getfile(method)).resolve()
    parts = [
        f"## `{name}` {{ #{name} }}",
        f"{escaped(method.summary[0].upper() + method.summary[1:])}.",
        *_docstrings(method),
    ]
    facts = [f"Source: {escaped(method.source)}"]
    if method.changes_start:
        facts.append(f"Before training its outputs differ from the frozen network's: {escaped(method.changes_start)}")
    if method.mergeable:
        facts.append("`harness export --merge` folds it into the backbone's own layers")
    if file.is_relative_to(ROOT):
        path = file.relative_to(ROOT).as_posix()
        modules = ROOT / "methods" / "modules" / file.name
        links = [f"[`{path}`](../../{path})"]
        if modules.is_file():
            links.append(f"[`methods/modules/{file.name}`](../../methods/modules/{file.name})")
        facts.append(f"Code: {', '.join(links)}")
    parts.append("\n".join(f"- {fact}" for fact in facts))
    ranges = declared_space(method)
    rows = []
    for found in method.Hyperparameters.describe():
        search = code(str(ranges[found["name"]])) if found["name"] in ranges else ""
        default = code(plain_value(found["default"]))
        rows.append((code(found["name"]), default, escaped(_bounds(found["bounds"])), search, escaped(found["help"])))
    parts.append(table(("`--set`", "default", "bounds", "search", "meaning"), rows))
    return "\n\n".join(parts)


def _bounds(bounds: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "pattern": "matches"}
    texts = [
        f"{sign} `{bounds[key]}`" if key == "pattern" else f"{sign} {bounds[key]:g}"
        for key, sign in signs.items()
        if key in bounds
    ]
    return ", ".join([*texts, *map(plain_value, bounds.get("enum", ()))])


def _docstrings(method: type[Method]) -> list[str]:
    """The docstrings of the class, of the bases that it shares with others, and of the file, as paragraphs.

    Of the file only what it says of the methods: not the title, nor where the modules are.
    """
    own = [cls for cls in method.__mro__ if cls.__module__ == method.__module__ and "__doc__" in vars(cls)]
    texts = [paragraph for cls in own if cls.__doc__ for paragraph in _paragraphs(cls.__doc__)]
    of_file = _paragraphs(sys.modules[method.__module__].__doc__ or "")[1:]
    texts += [text for text in of_file if not text.startswith("This file declares")]
    return [text for text in texts if not text.startswith(("Base class of", "What shallow and deep"))]


def _paragraphs(docstring: str) -> list[str]:
    """Docstrings are Markdown; asterisks and underscores in formulas are not."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return [escaped(paragraph).replace("\n- ", "\n\n- ", 1) for paragraph in paragraphs]
