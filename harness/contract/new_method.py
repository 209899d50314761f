"""`harness new-method`: a package with one small method, to begin a new one with. The files are in `template/`."""

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
    """Write a package with one small method into `folder`, which passes `harness check` as it is; returns its path.

    Raises `UserError` for a name that is invalid, is taken by a method or a module, or whose folder exists.
    """
    if not is_method_name(name) or keyword.iskeyword(name):
        raise UserError(f"new-method {name}: invalid name; give lower_case_with_underscores, such as my_method")
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
