"""An empty feature store."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.features.store import FeatureStore
from tests.support.feature_streams import LARGE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "features"


@pytest.fixture
def store(folder: Path) -> FeatureStore:
    return FeatureStore(folder, LARGE)
