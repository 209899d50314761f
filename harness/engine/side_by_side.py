"""Several runs in one process: one pass over data and frozen stages, each run with its own tensors and result."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Sequence

from harness.cells.resolve import Cell
from harness.engine import training
from harness.engine.attempt import RunAttempt
from harness.engine.device import make_reproducible
from harness.engine.failures import is_bug, outcome_of
from harness.engine.options import ExecutionOptions
from harness.engine.phases import Prepared
from harness.engine.run import batch_source, begin, evaluate, finish_training, load_pretrained, prepare, write
from harness.engine.training import TrainState
from harness.features.pretrained import PretrainedBackbone
from harness.runs.state import Outcome, RunEnded, RunState
from harness.runs.store import RunStore
from harness.spec import SharedDataKey


def execute_side_by_side(
    cells: Sequence[Cell],
    store: RunStore,
    options: ExecutionOptions,
    *,
    quiet: bool = False,
    expected_reuses: int = 0,
) -> list[Outcome]:
    """Execute or resume the runs of cells that see the same images; returns their outcomes, in their order.

    The cells may differ in method, hyperparameters and head (`ValueError` otherwise). Results are the same as if each
    cell were executed alone. If one fails, its outcome is recorded in its run folder and the others continue. `running`
    is the outcome of a run that another process executes.
    """
    if len({SharedDataKey.of(cell.spec) for cell in cells}) > 1:
        raise ValueError("cells that are executed side by side must see the same images through the same backbone")
    make_reproducible()
    with contextlib.ExitStack() as locks:
        group = _Group(len(cells))
        backbone: PretrainedBackbone | None = None
        for index, cell in enumerate(cells):
            try:
                attempt = RunAttempt(cell, store, options, quiet=quiet)  # with a loss scaler of its own
                locks.enter_context(attempt.locked())
                if not attempt.is_needed():
                    group.outcomes[index] = Outcome(RunState.DONE)
                    continue
                backbone = backbone or load_pretrained(cell)
                prepared = prepare(attempt, backbone)
                with attempt.failures_recorded():
                    group.running[index] = prepared, begin(prepared)
            except Exception as error:
                group.end(index, error)
        group.train_and_finish(expected_reuses)
    return [group.outcomes[index] for index in range(len(cells))]


class _Group:
    """The active runs and the outcomes of the others, by their index among the cells."""

    def __init__(self, size: int):
        self.running: dict[int, tuple[Prepared, TrainState]] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._alone = size == 1

    def train_and_finish(self, expected_reuses: int) -> None:
        try:
            if self.running:
                prepared, states = zip(*self.running.values(), strict=True)
                training.train(states, batch_source(prepared, states, expected_reuses), self._fail)
            for index in list(self.running):
                self._finish(index)
        except RunEnded:  # after a signal; some runs may be ahead of the loop's step
            for _, state in list(self.running.values()):
                self._fail(state, training.interrupted(state.step))
        except (Exception, KeyboardInterrupt) as error:  # a failure of all runs, such as unreadable data
            for _, state in list(self.running.values()):
                self._fail(state, error)

    def _finish(self, index: int) -> None:
        prepared, state = self.running[index]
        try:
            write(evaluate(finish_training(prepared, state, self._alone)))
        except Exception as error:
            self._fail(state, error)
        else:
            prepared.attempt.reporter.stop()
            self.outcomes[index] = Outcome(RunState.DONE)
            del self.running[index]

    def _fail(self, state: TrainState, error: BaseException) -> None:
        """Record the failure of one run and continue without it."""
        index = next(index for index, (_, other) in self.running.items() if other is state)
        prepared, _ = self.running.pop(index)
        self.end(index, prepared.attempt.record_failure(error))

    def end(self, index: int, error: BaseException) -> None:
        self.outcomes[index] = outcome_of(error)
        if is_bug(error):
            traceback.print_exception(error)
