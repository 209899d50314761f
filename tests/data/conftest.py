"""Tiny real datasets on disk, and the one line that an error must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import UserError
from tests.support.tiny_files import labels, picture, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`dataset.yaml` of three classes, with four train and two test pairs."""
    root = tmp_path / "shapes"
    for split, count in (("train", 4), ("test", 2)):
        for number in range(count):
            save(root / "images" / split / f"scene{number % 2}" / f"{number}.png", picture(number))
            save(root / "masks" / split / f"scene{number % 2}" / f"{number}.png", labels(number))
    (root / "dataset.yaml").write_text("classes: [sky, road, tree]\n")
    return root


@pytest.fixture
def refusal() -> Callable[[Callable[[], object]], str]:
    """The message of the `UserError` that a call raises, which must be one line."""

    def message(call: Callable[[], object]) -> str:
        with pytest.raises(UserError) as caught:
            call()
        text = str(caught.value)
        assert "\n" not in text
        return text

    return message
