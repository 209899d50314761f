"""Optuna's storage of a search: a database, or a journal file on a shared disk. It may go away and come back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from harness.util.text import causes

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "journal:"

_TIMEOUT = 10
"""Seconds that one request waits for a server or a lock."""


def open_storage(url: str) -> BaseStorage:
    """An SQLAlchemy URL or `journal:PATH`. Raises whatever Optuna and the driver raise where it cannot be used."""
    from optuna.storages import JournalStorage, RDBStorage, get_storage
    from optuna.storages.journal import JournalFileBackend

    if url.startswith(JOURNAL):
        path = Path(url.removeprefix(JOURNAL)).absolute()
        # Optuna's own lock stays for half a minute after its process was killed.
        lock = FileLock(f"{path}.lock", timeout=_TIMEOUT)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    arguments: dict[str, object] = {}
    if url.startswith("sqlite"):
        arguments = {"timeout": _TIMEOUT}
    elif re.match(r"postgres(ql)?(\+psycopg2?)?:", url):
        # A server whose machine is gone never answers; without these a request waits for hours.
        arguments = {"connect_timeout": _TIMEOUT, "keepalives_idle": _TIMEOUT, "tcp_user_timeout": 1000 * _TIMEOUT}
    return get_storage(RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": arguments}))


def is_away(error: BaseException) -> bool:
    """Whether the storage did not answer, rather than refused: a server or disk that is away for a while."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    return any(isinstance(cause, (InterfaceError, OperationalError, OSError)) for cause in causes(error))
