"""Optuna's storage of a search: a database, or a journal file on a shared disk. It may be temporarily unavailable."""

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
    """Open an SQLAlchemy URL or `journal:PATH`. Exceptions of Optuna and of the driver are not caught."""
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
        # A dead machine never answers; without these options a request waits for hours.
        arguments = {"connect_timeout": _TIMEOUT, "keepalives_idle": _TIMEOUT, "tcp_user_timeout": 1000 * _TIMEOUT}
    return get_storage(RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": arguments}))


def is_away(error: BaseException) -> bool:
    """Whether the storage did not answer, in contrast to a refusal: the server or disk is temporarily unavailable."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    return any(isinstance(cause, (InterfaceError, OperationalError, OSError)) for cause in causes(error))
