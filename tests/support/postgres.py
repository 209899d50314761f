"""The real PostgreSQL server of the system's packages: started on a socket of its own, stopped, started again."""

from __future__ import annotations

import functools
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

USER = "harness"


def missing() -> str | None:
    """Why no server can be started here; None where one can."""
    if _binaries() is None:
        return "no PostgreSQL server is installed (Debian: postgresql)"
    if os.geteuid() == 0 and _unprivileged() is None:
        return "PostgreSQL refuses to run as root, and there is no user `nobody`"
    return None


class Postgres:
    """A server that accepts connections after `start` and none after `stop`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pg"))  # short, as the path of a socket must be
        self._data = self._folder / "data"
        self._numbers = itertools.count()
        self._server: subprocess.Popen[bytes] | None = None
        self._as: dict[str, Any] = {"cwd": self._folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        if os.geteuid() == 0:
            nobody = _unprivileged()
            assert nobody is not None
            os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)
            self._as |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
        options = ["--auth=trust", f"--username={USER}", "--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run([self._program("initdb"), "-D", self._data, *options], check=True, timeout=900, **self._as)

    def create_database(self) -> str:
        """The URL of a database with nothing in it."""
        name = f"db{next(self._numbers)}"
        subprocess.run([self._program("createdb"), "-h", self._folder, "-U", USER, name], check=True, timeout=900)
        return f"postgresql+psycopg://{USER}@/{name}?host={self._folder}"

    def start(self) -> None:
        settings = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=50", "-k", str(self._folder)]
        self._server = subprocess.Popen([self._program("postgres"), "-D", self._data, *settings], **self._as)
        ready = [self._program("pg_isready"), "-h", self._folder, "-U", USER, "-q"]
        for _ in range(600):
            assert self._server.poll() is None, "the server ended as it started"
            if subprocess.run(ready, timeout=900).returncode == 0:
                return
            time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def stop(self) -> None:
        """As an administrator does at once: open connections are cut."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(60)
            self._server = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def _program(self, name: str) -> Path:
        folder = _binaries()
        assert folder is not None
        return folder / name


@functools.cache
def _binaries() -> Path | None:
    """Debian keeps the server's programs off the PATH."""
    found = shutil.which("postgres")
    folders = [Path(found).parent, Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if all((folder / name).exists() for name in _NEEDED)), None)


_NEEDED = ("postgres", "initdb", "pg_isready", "createdb")


def _unprivileged() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        return None
