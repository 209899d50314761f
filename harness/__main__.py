"""The entry point of `harness` and of `python -m harness`: handles signals first, then imports the commands."""

from __future__ import annotations

import atexit
import gc
import os
import signal

from harness.cli import STOPPED


def main() -> None:
    """Until the commands are imported there is nothing to clean up: Ctrl-C and SIGTERM end the process at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background jobs ignore Ctrl-C
            signal.signal(number, _stop)
    atexit.register(gc.freeze)  # else the collection at exit takes a second to search all of torch, for nothing
    from harness.cli.main import main as run_commands

    run_commands()


def _stop(number: int, frame: object) -> None:
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    main()
