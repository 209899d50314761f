"""Methods from outside this project: plugin files, and the provenance of a method's code.

The registry finds installed packages through the entry-point group `harness.methods`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.errors import UserError, located
from harness.method import Method, methods
from harness.util.files import sha256

VARIABLE = "HARNESS_PLUGINS"
"""Environment variable: plugin files, separated as in PATH. Child processes inherit it, and so load the same files."""

_HINT = "pass a .py file that defines a method"
_MODULE = "harness_plugin_"
_loaded: dict[Path, ModuleType] = {}


def load(files: Sequence[Path | str] = ()) -> None:
    """Register every method of these files and of those in `HARNESS_PLUGINS`, here and in child processes.

    A file that is already loaded is skipped. Raises `UserError` for a file that is missing, fails to import or defines
    no method, and for a method whose name is invalid or taken.
    """
    inherited = [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
    for file, origin in [(f, VARIABLE) for f in inherited] + [(str(f), "--plugin") for f in files]:
        path = Path(file).resolve()
        if path not in _loaded:
            with located(f"{origin} {file}"):
                _loaded[path] = _load(path)
    if _loaded:
        os.environ[VARIABLE] = os.pathsep.join(map(str, _loaded))


def loaded_files() -> list[Path]:
    return list(_loaded)


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError("no such file", hint=_HINT)
    name = _MODULE + re.sub(r"\W", "_", path.stem) + "_" + hashlib.sha256(str(path).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("not a Python file", hint=_HINT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        found = methods_of(module)
        _register(found)
    except UserError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; the user needs its name and the reason
        del sys.modules[name]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"failed to import: {reason}") from error
    return module


def methods_of(module: ModuleType) -> list[type[Method]]:
    """The methods that a module defines; imported and abstract classes and names with a leading `_` are skipped."""
    return [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, Method)
        and cls.__module__ == module.__name__
        and not inspect.isabstract(cls)
        and not cls.__name__.startswith("_")
    ]


def _register(found: Sequence[type[Method]]) -> None:
    """Register all methods, or none if one of them is invalid."""
    if not found:
        raise UserError("defines no method; a method is a concrete subclass of harness.method.Method")
    taken = set(methods.names())
    for cls in found:
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not is_method_name(name):
            raise UserError(f"{cls.__name__}: invalid name {name!r}; use lower_case_with_underscores")
        if name in taken:
            raise UserError(f"{cls.__name__}: the method name {name} is taken; choose another")
        taken.add(name)
    for cls in found:
        methods.register(cls.name)(cls)


def is_method_name(name: str) -> bool:
    """Whether the name is lower-case letters, digits and single underscores."""
    return re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) is not None


def reference(method: type[Method]) -> str | type[Method]:
    """How another process finds the method: by its name if it came from a file, else by importing the class."""
    return method.name if method.__module__.startswith(_MODULE) else method


# ---- provenance -----------------------------------------------------------------------------------------------------


def method_origin(method: type[Method]) -> dict[str, Any]:
    """Provenance of a method's code: `module`, and `package` with `version` if it was installed.

    For code from outside this project also `sha256`, of the file or of all Python files of its package, because such
    code can change while the harness's commit does not.
    """
    module = method.__module__
    origin: dict[str, Any] = {"module": module}
    if module.startswith(_MODULE):
        path = _file(method)
        return {"module": path.name, "sha256": sha256(path)}
    top = module.partition(".")[0]
    # By entry point: an editable install lists no files.
    points = metadata.entry_points(group=methods.group or "")
    point = next((p for p in points if p.value == f"{module}:{method.__qualname__}" and p.dist), None)
    if point is not None and point.dist is not None:
        origin |= {"package": point.dist.name, "version": point.dist.version}
    if top in ("harness", "methods"):
        return origin
    return {**origin, "sha256": _source_digest(_file(method), top)}


def outside_digest(method: type[Method]) -> str:
    """`sha256:...` of a plugin's code, for the fingerprint; empty for a shipped method."""
    digest = method_origin(method).get("sha256")
    return f"sha256:{digest}" if digest else ""


def _file(method: type[Method]) -> Path:
    return Path(inspect.getfile(method)).resolve()


def _source_digest(file: Path, top: str) -> str:
    """SHA-256 of the Python files of the package that holds `file`, or of the file if it is a single module."""
    root = next((parent for parent in file.parents if parent.name == top and (parent / "__init__.py").exists()), None)
    if root is None:
        return sha256(file)
    state = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        state.update(path.relative_to(root).as_posix().encode() + b"\0" + sha256(path).encode())
    return state.hexdigest()
