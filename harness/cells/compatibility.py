"""Which methods go with which backbones: asked before anything is run, remembered, and planned without torch."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
from harness.cells.plugins import load as load_plugins
from harness.cells.plugins import loaded_files
from harness.cells.resolve import Cell
from harness.util.files import sha256
from harness.util.json_cache import cached_json, read_cached_json


def reasons_against(cells: Sequence[Cell], cache: Path) -> list[str | None]:
    """For each cell the reason why its method does not go with its backbone, or None where it does.

    Networks are built once for each pair that was never asked about, in a process of their own.
    """
    keys = [_key(cell) for cell in cells]
    unknown = {repr(key): (key, cell.spec) for key, cell in zip(keys, cells, strict=True)
               if read_cached_json(cache, "support", key) is None}  # fmt: skip
    if unknown:
        asked = [(spec.method, spec.hyperparameters, spec.backbone) for _, spec in unknown.values()]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["harness.launch.preload"])
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(send, asked, [str(path) for path in loaded_files()]))
        process.start()
        send.close()
        try:
            answers = receive.recv()
        except EOFError:  # the process died: the runs themselves will say
            answers = []
        finally:
            process.join()
        for (key, _), answer in zip(unknown.values(), answers, strict=False):
            cached_json(cache, "support", key, lambda answer=answer: answer)
    return [(read_cached_json(cache, "support", key) or [None])[0] for key in keys]


def _key(cell: Cell) -> list[Any]:
    spec = cell.spec
    code = spec.method_code or sha256(Path(inspect.getfile(cell.method)))
    tuned = {name: value for name, value in spec.hyperparameters.items() if name not in ("lr", "weight_decay")}
    return [harness.__version__, version("timm"), spec.method, code, tuned, spec.backbone]


def _answer(send: Any, asked: list[tuple[str, dict[str, Any], str]], plugin_files: list[str]) -> None:
    """One list of a reason or None for each."""
    from harness.method import methods
    from harness.models.backbones import families

    load_plugins(plugin_files)
    backbones: dict[str, Any] = {}
    answers: list[list[str | None]] = []
    for method, hyperparameters, backbone in asked:
        try:
            if backbone not in backbones:
                backbones[backbone] = families.cut(backbone, families.create(backbone))
            kind = methods.get(method)
            said = kind(kind.Hyperparameters.model_validate(hyperparameters)).supports(backbones[backbone])
            answers.append([None if said else f"{method} on {backbone}: {said}"])
        except Exception:  # not an answer: the run will meet it, and record it
            answers.append([None])
    send.send(answers)
