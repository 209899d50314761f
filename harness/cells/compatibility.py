"""Which methods support which backbones: checked before anything is executed, and cached. Does not import torch."""

from __future__ import annotations

import contextlib
import functools
import inspect
import multiprocessing
import os
import threading
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness
from harness.cells.plugins import load as load_plugins
from harness.cells.plugins import loaded_files
from harness.cells.resolve import Cell
from harness.method import Hyperparameters, methods
from harness.util.files import sha256
from harness.util.fork_server import fork_context
from harness.util.json_cache import cached_json, read_cached_json

Question = tuple[str, dict[str, Any], str]
"""Method, its hyperparameters, backbone."""


def reasons_against(cells: Sequence[Cell], cache: Path) -> list[str | None]:
    """For each cell the reason why its method does not support its backbone, or None where it does.

    The network of each pair that is not in the cache is built once, in a separate process.
    """
    keys = [_key(cell) for cell in cells]
    unknown = {
        repr(key): (key, (cell.spec.method, cell.spec.hyperparameters, cell.spec.backbone))
        for key, cell in zip(keys, cells, strict=True)
        if read_cached_json(cache, "support", key) is None
    }
    if unknown:
        answers = _ask([question for _, question in unknown.values()])
        for (key, _), answer in zip(unknown.values(), answers, strict=False):
            cached_json(cache, "support", key, functools.partial(list, (answer,)))
    return [(read_cached_json(cache, "support", key) or [None])[0] for key in keys]


def _key(cell: Cell) -> list[Any]:
    """What the answer depends on. Hyperparameters that every method has are left out: they only affect training."""
    spec = cell.spec
    code = spec.method_code or sha256(Path(inspect.getfile(cell.method)))
    own = {name: value for name, value in spec.hyperparameters.items() if name not in Hyperparameters.model_fields}
    return [harness.__version__, version("timm"), spec.method, code, own, spec.backbone]


def _ask(questions: list[Question]) -> list[str | None]:
    """One answer per question; an empty list if the process died: the runs themselves then report the reason."""
    context = fork_context("harness.launch.preload")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(send, questions, [str(path) for path in loaded_files()]))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return []
    finally:
        process.kill()  # it has answered, or Ctrl-C came, which does not reach it
        process.join()


def _answer(send: Connection, questions: list[Question], plugin_files: list[str]) -> None:
    """Runs in the separate process: sends one answer per question."""
    threading.Thread(target=_end_with_the_asker, daemon=True).start()
    from harness.models.backbones import families  # torch is only imported in this process

    load_plugins(plugin_files)
    backbones: dict[str, Any] = {}
    answers: list[str | None] = []
    for method, hyperparameters, backbone in questions:
        try:
            if backbone not in backbones:
                backbones[backbone] = families.cut(backbone, families.create(backbone))
            kind = methods.get(method)
            supported = kind(kind.Hyperparameters.model_validate(hyperparameters)).supports(backbones[backbone])
            answers.append(None if supported else f"{method} on {backbone}: {supported}")
        except Exception:  # not an answer: the run will fail in the same way and record it
            answers.append(None)
    with contextlib.suppress(BrokenPipeError):
        send.send(answers)


def _end_with_the_asker() -> None:
    """A process that is ended while it starts this one can no longer kill it."""
    asker = multiprocessing.parent_process()
    assert asker is not None
    asker.join()
    os._exit(1)
