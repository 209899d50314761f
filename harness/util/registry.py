"""One small registry: name -> factory, filled by a decorator or by an entry-point group, with "did you mean"."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from harness.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing (`kind` is the word a user reads and the flag he types).

    With `group`, what installed packages declare under that entry-point group is known too, and is imported only
    when it is asked for.
    """

    def __init__(self, kind: str, group: str | None = None):
        self.kind = kind
        self.group = group
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a factory under `name`. A name that is taken is an error."""

        def add(factory: T) -> T:
            if name in self.names():
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._known[name] = factory
            return factory

        return add

    def names(self) -> list[str]:
        return sorted({*self._known, *self._declared()})

    def get(self, name: str) -> T:
        """The factory of that name. Raises `UserError` where there is none or its package fails to import."""
        if name in self._known:
            return self._known[name]
        declared = self._declared()
        if name not in declared:
            raise UserError(f"--{self.kind} {name}: no such {self.kind}; {did_you_mean(name, self.names())}")
        if len(declared[name]) > 1:
            values = " and ".join(sorted(point.value for point in declared[name]))
            raise UserError(f"--{self.kind} {name}: the name is declared twice, by {values}; uninstall one")
        (point,) = declared[name]
        try:
            self._known[name] = point.load()
        except Exception as error:  # a plug-in may fail in any way; the user needs its name and the reason
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"--{self.kind} {name}: {point.value} failed to import: {reason}") from error
        return self._known[name]

    def _declared(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        if self.group is not None:
            for point in set(entry_points(group=self.group)):
                found.setdefault(point.name, []).append(point)
        return found
