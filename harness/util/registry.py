"""A registry: name -> factory, filled by a decorator and by the entry points that installed packages declare."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from harness.errors import UserError, did_you_mean, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Factories of one kind by name. `kind` names it in errors, and is their field.

    With `group`, the entry points of that group are registered too; each is imported on first use. `elsewhere`: where
    else an unknown name may come from, as the end of a hint; called with the name and whether a known one is near.
    """

    def __init__(
        self, kind: str, group: str | None = None, elsewhere: Callable[[str, bool], str] = lambda name, near: ""
    ):
        self.kind = kind
        self.group = group
        self._elsewhere = elsewhere
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a factory under `name`. Raises `ValueError` for a name that is taken."""

        def add(factory: T) -> T:
            if name in self.names():
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._known[name] = factory
            return factory

        return add

    def names(self) -> list[str]:
        return sorted({*self._known, *self._declared()})

    def get(self, name: str) -> T:
        """The factory of that name. Raises `UserError` for an unknown name or a package that fails to import."""
        if name in self._known:
            return self._known[name]
        declared = self._declared()
        if name not in declared:
            known = self.names()
            hint = did_you_mean(name, known) + self._elsewhere(name, bool(nearest(name, known)))
            raise UserError(f"no such {self.kind}", field=self.kind, value=name, hint=hint)
        if len(declared[name]) > 1:
            values = " and ".join(sorted(point.value for point in declared[name]))
            raise UserError(f"declared twice, by {values}", field=self.kind, value=name, hint="uninstall one")
        (point,) = declared[name]
        try:
            self._known[name] = point.load()
        except Exception as error:  # a plugin may fail in any way; the user needs its name and the reason
            problem = f"{point.value} failed to import: {type(error).__name__}: {error}"
            raise UserError(problem, field=self.kind, value=name) from error
        return self._known[name]

    def _declared(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        if self.group is not None:
            for point in set(entry_points(group=self.group)):
                found.setdefault(point.name, []).append(point)
        return found
