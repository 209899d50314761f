"""The registry: names, entry points, and the errors for missing, duplicate and broken ones."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint

import pytest

from harness.errors import UserError, did_you_mean
from harness.util.registry import Registry

GROUP = "harness.things"


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry[object]]:
    """A registry of things over packages that declare these (name, value) pairs."""

    def registry(*declared: tuple[str, str]) -> Registry[object]:
        points = [EntryPoint(name, value, GROUP) for name, value in declared]
        monkeypatch.setattr("harness.util.registry.entry_points", lambda group: points if group == GROUP else [])
        return Registry("thing", group=GROUP)

    return registry


def test_names_are_sorted_and_factories_found() -> None:
    things: Registry[object] = Registry("thing")
    for name in ("b", "a"):
        things.register(name)(name.upper())
    assert things.names() == ["a", "b"]
    assert things.get("a") == "A"


def test_duplicate_name_is_refused(declare: Callable[..., Registry[object]]) -> None:
    things = declare(("ordered", "collections:OrderedDict"))
    with pytest.raises(ValueError, match="thing 'ordered' is already registered"):
        things.register("ordered")(object())


def test_entry_point_is_imported_on_first_use(declare: Callable[..., Registry[object]]) -> None:
    things = declare(("ordered", "collections:OrderedDict"), ("broken", "no_such_package:Thing"))
    assert things.names() == ["broken", "ordered"]
    assert things.get("ordered").__name__ == "OrderedDict"  # type: ignore[attr-defined]


def test_failing_entry_point_is_named_with_the_reason(declare: Callable[..., Registry[object]]) -> None:
    things = declare(("broken", "no_such_package:Thing"))
    with pytest.raises(UserError, match="thing broken: no_such_package:Thing failed to import: ModuleNotFoundError"):
        things.get("broken")


def test_name_declared_by_two_packages_is_refused(declare: Callable[..., Registry[object]]) -> None:
    things = declare(("twin", "collections:OrderedDict"), ("twin", "collections:Counter"))
    with pytest.raises(UserError, match="declared twice, by collections:Counter and collections:OrderedDict"):
        things.get("twin")


def test_package_found_twice_on_the_path_counts_once(declare: Callable[..., Registry[object]]) -> None:
    things = declare(("ordered", "collections:OrderedDict"), ("ordered", "collections:OrderedDict"))
    assert things.get("ordered").__name__ == "OrderedDict"  # type: ignore[attr-defined]


def test_unknown_name_gets_a_suggestion() -> None:
    assert did_you_mean("upper", ["uper", "fpn"]) == "did you mean uper?"
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", []) == "known: none"
    assert did_you_mean("zzz", map(str, range(31))) == "none of 31 known names is similar"


def test_shipped_methods_are_entry_points() -> None:
    from harness.method import methods

    assert {"full", "linear", "spm"} <= set(methods.names())
    assert methods.get("spm").name == "spm"
