"""Heads, backbone families and the roles of layers, from their registries."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from markup import code, escaped, table

from harness.models.heads import heads as head_registry

FAMILIES = Path(__file__).parents[2] / "harness" / "models" / "backbones" / "families"


def heads() -> str:
    rows = [
        (code(name), escaped(inspect.cleandoc(head_registry.get(name).__doc__ or ""))) for name in head_registry.names()
    ]
    return table(("head", "what it is"), rows)


def backbones() -> str:
    """timm's modules by family. Read from the source: importing the families would import torch and timm."""
    rows = []
    for file in sorted(FAMILIES.glob("[a-z]*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            modules = [
                ast.literal_eval(key)
                for one in node.body
                if isinstance(one, ast.Assign | ast.AnnAssign) and "modules" in ast.unparse(one).split("=")[0]
                if isinstance(one.value, ast.Dict)
                for key in one.value.keys
                if key is not None
            ]
            if modules:
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                link = f"[{code(file.name)}](../../{file.relative_to(FAMILIES.parents[3]).as_posix()})"
                rows.append((", ".join(map(code, modules)), escaped(text), link))
    return table(("timm modules", "networks", "file"), rows)


def attach_points() -> str:
    """The verbs by which a method attaches modules: the first line of each docstring, from the source."""
    file = FAMILIES.parent / "attach.py"
    (points,) = (
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "AttachPoints"
    )
    rows = []
    for node in points.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("insert_", "add_")):
            arguments = ", ".join(one.arg for one in node.args.args[1:])
            text = (ast.get_docstring(node) or "").split("\n\n")[0]
            rows.append((code(f"{node.name}({arguments})"), escaped(text)))
    return table(("verb", "what happens"), rows)
