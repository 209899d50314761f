"""Methods from outside this project: single files, where a method came from, and a new package to begin with.

Installed packages are found by the registry through the entry-point group `harness.methods`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import keyword
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any

from harness.errors import UserError
from harness.method import Method, methods
from harness.util.files import sha256, write_text

VARIABLE = "HARNESS_PLUGINS"
"""Environment variable: plugin files, separated as PATH is. Processes that this one starts load the same."""

_MODULE = "harness_plugin_"
_loaded: dict[Path, ModuleType] = {}


def load(files: Sequence[Path | str] = ()) -> None:
    """Register every method of these files and of those that `HARNESS_PLUGINS` names; hand them on to sub-processes.

    A file that is loaded already is left alone. Raises `UserError` that names the file, for one that is missing, does
    not import, defines no method, or takes a name that is taken.
    """
    inherited = [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
    for file, origin in [(f, VARIABLE) for f in inherited] + [(str(f), "--plugin") for f in files]:
        path = Path(file).resolve()
        if path not in _loaded:
            _loaded[path] = _load(path, f"{origin} {file}")
    if _loaded:
        os.environ[VARIABLE] = os.pathsep.join(map(str, _loaded))


def loaded_files() -> list[Path]:
    return list(_loaded)


def _load(path: Path, said: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{said}: no such file; give a .py file that defines a method")
    name = _MODULE + re.sub(r"\W", "_", path.stem) + "_" + hashlib.sha256(str(path).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{said}: not a Python file; give a .py file that defines a method")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        found = methods_of(module)
        _register(found, said)
    except UserError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; the user needs its name and the reason
        del sys.modules[name]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{said}: failed to import: {reason}") from error
    return module


def methods_of(module: ModuleType) -> list[type[Method]]:
    """The methods that a module defines: what it imports, abstract classes and names with `_` in front are not."""
    return [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, Method)
        and cls.__module__ == module.__name__
        and not inspect.isabstract(cls)
        and not cls.__name__.startswith("_")
    ]


def _register(found: Sequence[type[Method]], said: str) -> None:
    """All of them, or, where one does not fit, none."""
    if not found:
        raise UserError(f"{said}: defines no method; a method is a subclass of harness.method.Method with its parts")
    taken = set(methods.names())
    for cls in found:
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not is_method_name(name):
            raise UserError(f"{said}: {cls.__name__}: its name is {name!r}; give lower_case_with_underscores")
        if name in taken:
            raise UserError(f"{said}: {cls.__name__}: the method name {name} is taken; choose another")
        taken.add(name)
    for cls in found:
        methods.register(cls.name)(cls)


def is_method_name(name: str) -> bool:
    """Lower-case letters, digits and underscores: what a file, a table and a command line can all carry."""
    return re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) is not None


def reference(method: type[Method]) -> str | type[Method]:
    """What another process finds the method by: its name if it came from a file, else the class to be imported."""
    return method.name if method.__module__.startswith(_MODULE) else method


# ---- where a method came from ---------------------------------------------------------------------------------------


def method_origin(method: type[Method]) -> dict[str, Any]:
    """Provenance of a method's code: `module`, and `package` with `version` where it was installed.

    For what is not of this project also `sha256` of the file, or of all Python files of its package: such code can
    change while the harness's commit does not.
    """
    module = method.__module__
    origin: dict[str, Any] = {"module": module}
    if module.startswith(_MODULE):
        path = _file(method)
        return {"module": path.name, "sha256": sha256(path)}
    top = module.partition(".")[0]
    # An editable install lists no files of its own, and so is found by the entry point that it declares.
    points = metadata.entry_points(group=methods.group or "")
    point = next((p for p in points if p.value == f"{module}:{method.__qualname__}" and p.dist), None)
    if point is not None and point.dist is not None:
        origin |= {"package": point.dist.name, "version": point.dist.version}
    if top in ("harness", "methods"):
        return origin
    return {**origin, "sha256": _source_digest(_file(method), top)}


def outside_digest(method: type[Method]) -> str:
    """`sha256:...` of a method's code from outside this project, for the fingerprint; empty for a shipped method."""
    digest = method_origin(method).get("sha256")
    return f"sha256:{digest}" if digest else ""


def _file(method: type[Method]) -> Path:
    return Path(inspect.getfile(method)).resolve()


def _source_digest(file: Path, top: str) -> str:
    """Over the Python files of the package that holds `file`, or over the file where it is a module of its own."""
    root = next((parent for parent in file.parents if parent.name == top and (parent / "__init__.py").exists()), None)
    if root is None:
        return sha256(file)
    state = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        state.update(path.relative_to(root).as_posix().encode() + b"\0" + sha256(path).encode())
    return state.hexdigest()


# ---- `harness new-method` -------------------------------------------------------------------------------------------


def new_method(name: str, folder: Path) -> Path:
    """Write a package with one small method into `folder`; returns its path. It passes `harness check` as written.

    Raises `UserError` for a name that is not one, is taken by a method or a module, or whose folder exists.
    """
    if not is_method_name(name) or keyword.iskeyword(name):
        raise UserError(f"new-method {name}: not a name; give lower_case_with_underscores, such as my_method")
    if name in methods.names():
        raise UserError(f"new-method {name}: the method name is taken; choose another (`harness list methods`)")
    root = folder / name.replace("_", "-")
    if root.exists():
        raise UserError(f"new-method {name}: {root} exists; remove it, or choose another name")
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"new-method {name}: a Python module of that name is installed; choose another")
    words = {"name": name, "dashes": root.name, "cls": "".join(part.capitalize() for part in name.split("_"))}
    templates = resources.files("harness") / "contract" / "template"
    for template, target in {
        "pyproject.toml.in": "pyproject.toml",
        "README.md.in": "README.md",
        "method.py.in": f"src/{name}/__init__.py",
        "modules.py.in": f"src/{name}/modules.py",
        "test_method.py.in": f"tests/test_{name}.py",
    }.items():
        text = Template((templates / template).read_text(encoding="utf-8")).substitute(words)
        write_text(root / target, text)
    return root
