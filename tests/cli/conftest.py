"""What the tests of commands share: no developer settings, no network, one finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.in_process import train
from tests.support.tiny_cell import run_arguments


@pytest.fixture(autouse=True)
def _no_developer_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HARNESS_RUNS", "HARNESS_DATA", "HARNESS_CACHE_SIZE", "HARNESS_PLUGINS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory, colours: Path, tiny: Path) -> list[str | Path]:
    """The command line of a finished run."""
    runs = tmp_path_factory.mktemp("finished")
    train(colours, tiny, runs, "--set", "hidden=8")
    return run_arguments(colours, tiny, runs, "--set", "hidden=8")
