"""Losses are read many steps later on a GPU, so that steps can be queued; nothing of a run depends on when."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.engine import training
from harness.engine.training import TrainState
from tests.support.in_process import call
from tests.support.run_commands import assert_same, only_run
from tests.support.tiny_cell import run_arguments

EXPLOSIVE = ["--method", "full", "--head", "linear", "--set", "statistics=frozen", "--set", "lr=10"]
EXPLOSIVE += ["--set", "head_lr=10"]


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point of the curve every four of twelve steps, and losses that are read every three."""
    monkeypatch.setattr(training, "CURVE_POINTS", 3)
    monkeypatch.setattr(training, "UNREAD_STEPS", 3)


@pytest.fixture
def read_late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of losses that were read at once."""
    counts: list[int] = []
    read = TrainState._read_losses
    monkeypatch.setattr(TrainState, "_reads_at_once", False)
    monkeypatch.setattr(TrainState, "_read_losses", lambda self: (counts.append(len(self._unread)), read(self))[1])
    return counts


@pytest.fixture(scope="module")
def read_at_once(colours: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("at-once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CURVE_POINTS", 3)
        assert call(*run_arguments(colours, tiny, runs / "whole")).code == 0
        assert call(*run_arguments(colours, tiny, runs / "diverged", *EXPLOSIVE)).code == 1
    return runs


def test_run_is_the_same_when_losses_are_read_late(
    colours: Path, tiny: Path, tmp_path: Path, read_at_once: Path, read_late: list[int]
) -> None:
    assert call(*run_arguments(colours, tiny, tmp_path)).code == 0
    assert [count for count in read_late if count] == [1, 3, 3, 1, 3, 1]  # the first, and at points 4, 8 and 12
    assert_same(only_run(tmp_path), only_run(read_at_once / "whole"))


def test_step_of_a_loss_that_is_not_finite_is_named_although_it_is_read_late(
    colours: Path, tiny: Path, tmp_path: Path, read_at_once: Path, read_late: list[int]
) -> None:
    found = call(*run_arguments(colours, tiny, tmp_path, *EXPLOSIVE))
    assert found.code == 1 and max(read_late) > 1
    now, expected = only_run(tmp_path).status(), only_run(read_at_once / "diverged").status()
    assert now is not None and expected is not None
    assert (now.state, now.reason, now.step) == (expected.state, expected.reason, expected.step)


def test_checkpoint_holds_the_losses_of_all_its_steps(
    colours: Path, tiny: Path, tmp_path: Path, read_at_once: Path, read_late: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped two steps after a point, with losses unread, and resumed."""
    learn = TrainState.learn

    def stopped(state: TrainState, *arguments: object) -> None:
        learn(state, *arguments)  # type: ignore[arg-type]
        if state.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "learn", stopped)
        patch.setattr(TrainState, "save_if_due", lambda state, stopping: state.save())
        assert call(*run_arguments(colours, tiny, tmp_path)).code != 0
    assert call(*run_arguments(colours, tiny, tmp_path)).code == 0
    assert "resuming from step 5" in only_run(tmp_path).log_path.read_text()
    assert_same(only_run(tmp_path), only_run(read_at_once / "whole"))
