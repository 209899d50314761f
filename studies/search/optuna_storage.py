"""Where Optuna keeps a search: a database, or a journal file on a shared disk. It may go away and come back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "journal:"

_SECONDS = 10
"""The most that one request waits for a server or a lock."""


def open_storage(url: str) -> BaseStorage:
    """An SQLAlchemy URL or `journal:PATH`. Raises whatever Optuna and the driver raise where it cannot be used."""
    from optuna.storages import JournalStorage, RDBStorage, get_storage
    from optuna.storages.journal import JournalFileBackend

    if url.startswith(JOURNAL):
        path = Path(url.removeprefix(JOURNAL)).absolute()
        # Optuna's own lock outlives a killed process by half a minute.
        lock = FileLock(f"{path}.lock", timeout=_SECONDS)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]
    arguments: dict[str, object] = {}
    if url.startswith("sqlite"):
        arguments = {"timeout": _SECONDS}
    elif re.match(r"postgres(ql)?(\+psycopg2?)?:", url):
        # A server whose machine is gone says nothing at all; without these a request waits for hours.
        arguments = {"connect_timeout": _SECONDS, "keepalives_idle": _SECONDS, "tcp_user_timeout": 1000 * _SECONDS}
    return get_storage(RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": arguments}))


def is_away(error: BaseException) -> bool:
    """Whether the storage did not answer, as opposed to having refused: a server or disk that is away for a while."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    return any(isinstance(cause, (InterfaceError, OperationalError, OSError)) for cause in _causes(error))


def reason(error: BaseException) -> str:
    """The innermost cause in one line: what Optuna and SQLAlchemy wrap around it fills a screen."""
    *_, innermost = _causes(error)
    text = " ".join(str(innermost).split()) or type(innermost).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def without_password(url: str) -> str:
    return re.sub(r"://[^/]*@", "://", url)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
