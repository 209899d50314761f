"""The support question is asked once for all cells that differ only in how they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.cells import compatibility
from harness.cells.compatibility import Question, reasons_against
from harness.cells.resolve import resolve
from harness.runs.store import RunStore
from tests.support.run_commands import request


def test_support_is_checked_once_for_all_learning_rates(
    colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Question] = []

    def ask(questions: list[Question]) -> list[str | None]:
        asked.extend(questions)
        return ["no" if method == "vpt_deep" else None for method, _, _ in questions]

    monkeypatch.setattr(compatibility, "_ask", ask)
    settings: list[dict[str, Any]] = [{"lr": 0.01}, {"head_lr": 0.01}, {"weight_decay": 0.1}, {"hidden": 8}]
    requests = [request(colours, tiny, settings=changed) for changed in settings]
    requests.append(request(colours, tiny, method="vpt_deep"))
    cells = [resolve(one, RunStore(tmp_path), tmp_path) for one in requests]
    for _ in range(2):  # the second time from the cache
        assert reasons_against(cells, tmp_path / "cache") == [None, None, None, None, "no"]
    assert [(method, hyperparameters.get("hidden")) for method, hyperparameters, _ in asked] == [
        ("spm", cells[0].spec.hyperparameters["hidden"]), ("spm", 8), ("vpt_deep", None)
    ]  # fmt: skip
