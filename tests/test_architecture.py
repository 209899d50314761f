"""The layout of the code: imports go down the layers, never in a circle, and files stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("harness", "methods", "studies", "reports")
LAYERS = (
    ("harness.errors",),
    ("harness.util",),
    ("harness.spec", "harness.method"),
    ("harness.data",),
    ("harness.models",),
    ("harness.runs",),
    ("harness.tracking",),
    ("harness.cells",),
    ("harness.features",),
    ("harness.engine",),
    ("harness.launch", "harness.deploy", "harness.contract"),
    ("harness.cli",),
    ("methods",),
    ("studies",),
    ("reports",),
)
"""From the lowest to the highest. A module imports from its own layer and from lower ones."""
FOR_USERS = ("harness", "harness.__main__")
"""The public names and `python -m harness`: above everything, imported by nothing."""
LONGEST = 400


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Modules of this project that a file imports, inside functions too; imports for type checkers are left out."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {member if member in MODULES else node.module for member in members}
        pending += ast.iter_child_nodes(node)


def layer(module: str) -> int | None:
    for number, packages in enumerate(LAYERS):
        if any(module == package or module.startswith(f"{package}.") for package in packages):
            return number
    return None


def test_every_module_belongs_to_a_layer() -> None:
    assert {module for module in MODULES if layer(module) is None} == set(FOR_USERS)


def test_no_import_goes_up() -> None:
    upward = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in imports(path)
        if module not in FOR_USERS and imported != "harness" and (layer(imported) or 0) > (layer(module) or 0)
    ]
    assert upward == []


def test_no_import_cycles() -> None:
    graph = {module: set(imports(path)) - {module} for module, path in MODULES.items() if module not in FOR_USERS}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_two_classes_or_types_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name[0].isupper() and not name.isupper():  # `Colour = tuple[int, int, int]`
                    places.setdefault(name, []).append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_root_of_harness_has_few_modules() -> None:
    root = [path.name for path in (ROOT / "harness").glob("*.py") if not path.name.startswith("__")]
    assert len(root) <= 4


def test_no_file_is_long() -> None:
    files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}
