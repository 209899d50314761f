"""`harness new-method`: creates a package with one small method as a starting point. Its files are in `template/`."""

from __future__ import annotations

import importlib.util
import keyword
from importlib import resources
from pathlib import Path
from string import Template

from harness.cells.plugins import is_method_name
from harness.errors import UserError
from harness.method import methods
from harness.util.files import write_text


def new_method(name: str, folder: Path) -> Path:
    """Write a package with one small method, which passes `harness check`, into `folder`; returns its path.

    Raises `UserError` if the name is invalid or taken by a method or a module, or if the folder exists.
    """
    if not is_method_name(name) or keyword.iskeyword(name):
        raise UserError(f"new-method {name}: invalid name; use lower_case_with_underscores, such as my_method")
    if name in methods.names():
        raise UserError(f"new-method {name}: the method name is taken; choose another (`harness list methods`)")
    root = folder / name.replace("_", "-")
    if root.exists():
        raise UserError(f"new-method {name}: {root} exists; remove it, or choose another name")
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"new-method {name}: a Python module of that name is installed; choose another")
    values = {"name": name, "dashes": root.name, "cls": "".join(part.capitalize() for part in name.split("_"))}
    templates = resources.files("harness") / "contract" / "template"
    for template, target in {
        "pyproject.toml.in": "pyproject.toml",
        "README.md.in": "README.md",
        "method.py.in": f"src/{name}/__init__.py",
        "modules.py.in": f"src/{name}/modules.py",
        "test_method.py.in": f"tests/test_{name}.py",
    }.items():
        text = Template((templates / template).read_text(encoding="utf-8")).substitute(values)
        write_text(root / target, text)
    return root
