"""What tests of whole runs share: one tiny dataset, one tiny budget, and a developer's shell kept out."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_cell import make_budget, make_dataset


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight train and five test images of 64×64, three classes by colour, some pixels ignored. Not to be changed."""
    return make_dataset(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A budget of twelve steps of four crops of 32×32."""
    return make_budget(tmp_path_factory.mktemp("budgets") / "tiny.yaml")
