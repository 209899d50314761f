"""Stores for the tests of tracking: none, and one with the tables of MLflow and nothing in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from harness.tracking.mlflow_store import EXPERIMENT


@pytest.fixture(autouse=True)
def _no_tracking_server_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A folder for runs without a store."""
    runs = tmp_path / "my #runs"  # users' folders have such names, and they end up in URIs
    runs.mkdir()
    return runs


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To create it takes two seconds, to copy it none."""
    path = tmp_path_factory.mktemp("schema") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").get_experiment_by_name(EXPERIMENT)
    return path


@pytest.fixture
def runs(fresh: Path, schema: Path) -> Path:
    """A folder for runs with an empty store."""
    shutil.copy(schema, fresh / "mlflow.db")
    return fresh
