"""The output of a study and a search: the plan, then a live table or lines, and the final table and JSON."""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from harness.cli.tables import about_classes
from harness.data.fit import describe_parts, warnings
from harness.models.backbones.packaged import display_name
from harness.runs.state import RunState
from harness.runs.store import RunStore
from harness.util.text import counted, duration
from studies.plan import Plan, PlannedCell, PlannedSearch, rows_of
from studies.scheduler import SearchTask
from studies.search.spec import TrialState
from studies.study import shown_label
from studies.tune import HEAD_LR

if TYPE_CHECKING:
    from rich.live import Live as RichLive

    from studies.search.search import Search

RATES = ("lr", HEAD_LR)
"""The hyperparameters in the table of scores: without them, no score of tuned methods can be judged."""
PLAIN_SECONDS = 30
"""The least seconds between two plain lines of overall progress."""
SHOWN_CELLS = 4
"""The most running cells that such a line shows one by one."""


def work_left(plan: Plan) -> bool:
    return any(cell.spec is not None or cell.state is RunState.WAITING for cell in plan.left)


def describe(plan: Plan) -> list[str]:
    """The plan in a few lines: axes, states of the cells, sizes of the parts, warnings, reasons, the estimated time."""
    study = plan.study
    axes = {"methods": study.methods, "backbones": study.backbones, "datasets": study.datasets, "heads": study.heads,
            "seeds": study.seeds}  # fmt: skip
    sizes = " × ".join(f"{len(values)} {name if len(values) > 1 else name[:-1]}" for name, values in axes.items())
    budget = study.the_budget()
    lines = [f"{study.title or study.name}: {sizes} = {counted(len(plan.cells), 'cell')}, budget {budget.name} "
             f"({budget.steps} steps of {budget.batch_size})"]  # fmt: skip
    lines.append("  " + ", ".join(f"{count} {state.label}" for state, count in sorted(plan.count().items())))
    if study.tune is not None:
        seeds = study.tune.seeds
        for searches, what in ((plan.heads, "of the head's learning rate"), (plan.searches, "of methods")):
            searches = [search for search in searches if search.space]
            if searches:
                ended = sum(search.ended for search in searches)
                trials = sorted({search.trials for search in searches})
                each = f"{trials[0]} to {trials[-1]} trials" if len(trials) > 1 else counted(trials[0], "trial")
                each += f" of {len(seeds)} seeds" if len(seeds) > 1 else ""
                number = counted(len(searches), "search", "searches")
                lines.append(f"  {number} {what}, {each} on the dev split, {counted(ended, 'trial')} ended")
        own = [f"{search.label} searches {text}" for search in plan.searches for text in search.own_ranges()]
        lines += [f"  {text}" for text in dict.fromkeys(own)]
        beyond = [text for search in (*plan.heads, *plan.searches) for text in search.undeclared()]
        lines += [f"  warning: {text}" for text in dict.fromkeys(beyond)]
    for dataset in plan.datasets:
        lines.append(f"  {describe_parts(dataset, budget.dev_fraction, budget.train_fraction)}")
        lines += [f"  warning: {text}" for text in warnings(dataset, budget)]
    lines += [f"  {note}" for note in notes(plan)]
    seconds = plan.seconds_left()
    if work_left(plan):
        known = (
            f"{duration(seconds)} of training in one process"
            if seconds is not None
            else "unknown until one cell is done"
        )
        lines.append(f"  estimated: {known}")
    return lines


def notes(plan: Plan) -> list[str]:
    """The reasons why cells have no score, each once, with the number of its cells."""
    counted = Counter(
        (cell.state, cell.reason or "unknown reason")
        for cell in plan.cells
        if cell.state.failed or cell.state in (RunState.UNSUPPORTED, RunState.DAMAGED)
    )
    return [f"{state.label} ({count}): {reason}" for (state, reason), count in counted.items()]


def table(plan: Plan) -> list[dict[str, str]]:
    """One line per method, backbone, dataset and head: mIoU over the finished seeds, and the states of the others.

    The searches of the head's learning rate come first.
    """
    searches = {id(cell): row for row in plan.searches for cell in row.cells}
    tuned = plan.study.tune is not None
    rows = rows_of(plan)
    return [_head_line(head) for head in plan.heads] + [
        _line(row, searches.get(id(row["cells"][0])), tuned) for row in rows
    ]


def _head_line(head: PlannedSearch) -> dict[str, str]:
    request = head.request
    chosen = head.chosen or {}
    state = RunState.DONE
    if head.chosen is None:
        state = RunState.FAILED if head.finished else RunState.RUNNING if head.ended else RunState.TO_DO
    return {
        "backbone": display_name(request.backbone, request.weights),
        "dataset": Path(request.dataset).name,
        "head": request.head,
        "method": shown_label(head.label, [request.head]),
        "mIoU": "-",
        "seeds": "-",
        "trials": _trials(head),
        **{name: f"{chosen[name]:g}" if name in chosen else "-" for name in RATES},
        "state": state.label + _remarks(head),
    }


def _line(row: dict[str, Any], search: PlannedSearch | None, tuned: bool) -> dict[str, str]:
    cells: list[PlannedCell] = row["cells"]
    values = [cell.miou for cell in cells if cell.state is RunState.DONE and cell.miou is not None]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    states = Counter(cell.state for cell in cells)
    return {
        "backbone": row["backbone"],
        "dataset": row["dataset"],
        "head": row["head"],
        "method": shown_label(row["label"], [row["head"]]),
        "mIoU": f"{statistics.fmean(values):.4f}{spread}" if values else "-",
        "seeds": f"{states[RunState.DONE]}/{len(cells)}",
        **({"trials": _trials(search) if search else "-"} if tuned else {}),
        **{name: _rates(cells, name) for name in RATES},
        "state": ", ".join(s.label if count == len(cells) else f"{count} {s.label}" for s, count in states.items())
        + _remarks(search)
        + about_classes([cell.scores for cell in cells]),
    }


def _rates(cells: list[PlannedCell], name: str) -> str:
    """A learning rate of the cells' runs; `-` where it is not known yet, or the method has none."""
    found = [cell.spec.hyperparameters[name] for cell in cells if cell.spec and name in cell.spec.hyperparameters]
    return ", ".join(f"{value:g}" for value in dict.fromkeys(found)) or "-"


def _trials(search: PlannedSearch) -> str:
    """`3/3`, with the numbers of failed and pruned trials."""
    if not search.space:
        return "-"
    trials = search.folder.trials() if search.folder else []
    counted = Counter(trial.state for trial in trials if trial.number < search.trials)
    ended = counted.total() - counted[TrialState.RUNNING]
    lost = "".join(f", {counted[state]} {state}" for state in (TrialState.FAILED, TrialState.PRUNED) if counted[state])
    return f"{ended}/{search.trials}{lost}"


def _remarks(search: PlannedSearch | None) -> str:
    """What makes a search's choice doubtful: trials with equal scores, or values at the edge of their range."""
    if search is None:
        return ""
    scores = search.scores()
    # To the last digit: what was varied changes nothing here.
    repeated = len(scores) - len(set(scores))
    some = [f"{repeated} of {len(scores)} trials repeat another's score"] if repeated and len(set(scores)) > 1 else []
    return "".join(f", {doubt}" for doubt in some + search.doubts())


class Live:
    """Live output while a scheduler runs: redrawn on a terminal, lines elsewhere."""

    def __init__(self, quiet: bool):
        self._redraws = not quiet and sys.stderr.isatty()
        self._live: RichLive | None = None
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._redraws:
            from rich.console import Console
            from rich.live import Live as RichLive

            self._live = RichLive(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self._last_line = time.monotonic()


class LiveLine(Live):
    """The progress of one search."""

    def __init__(self, task: SearchTask, quiet: bool):
        super().__init__(quiet)
        self._task = task
        self._last = ""

    def update(self, changed: PlannedCell | SearchTask | None) -> None:
        text = trials_so_far(self._task.search)
        if self._live is not None:
            self._live.update(f"{text}, {duration(time.monotonic() - self._began)} so far", refresh=True)
        elif text != self._last:
            self.line(text)
        self._last = text


class LiveTable(Live):
    """The live table of a study."""

    def __init__(self, plan: Plan, store: RunStore, quiet: bool):
        super().__init__(quiet)
        self._plan = plan
        self._store = store
        self._done_before = plan.count()[RunState.DONE]
        self._last_lines: dict[str, str] = {}
        """Of each search."""

    def update(self, changed: PlannedCell | SearchTask | None) -> None:
        if self._live is not None:
            self._live.update(self._drawn(), refresh=True)
        elif isinstance(changed, PlannedCell):
            self.line(f"{_title(changed)}: {changed.state.label}" + self._score(changed))
        elif isinstance(changed, SearchTask):
            name, text = changed.search.spec.name, trials_so_far(changed.search)
            if self._last_lines.get(name) != text:
                self.line(text)
            self._last_lines[name] = text
        elif time.monotonic() - self._last_line > PLAIN_SECONDS:
            self.line(self._summary(details=True))

    @staticmethod
    def _score(cell: PlannedCell) -> str:
        if cell.state is RunState.DONE and cell.miou is not None:
            return f", mIoU {cell.miou:.4f}"
        return f" ({cell.reason})" if cell.reason else ""

    def _summary(self, details: bool = False) -> str:
        """`details`: also how far the running cells are, if they are few."""
        count = self._plan.count()
        left = len(self._plan.left)
        done = count[RunState.DONE] - self._done_before
        passed = time.monotonic() - self._began
        running = [(cell, self._share(cell)) for cell in self._plan.cells if cell.state is RunState.RUNNING]
        begun = sum(share for _, share in running)
        rest = ""
        if done and not self._plan.searches:
            rest = f", about {duration(passed / (done + begun) * (left - begun))} left"
        shown = running if details and len(running) <= SHOWN_CELLS else []
        at = "".join(f", {cell.label} (seed {cell.request.seed}) at {share:.0%}" for cell, share in shown)
        cells = f"{count[RunState.DONE]} of {len(self._plan.cells)} cells done, {left} left"
        return f"{cells}{at}, {duration(passed)} so far{rest}"

    def _share(self, cell: PlannedCell) -> float:
        """How much of a running cell's training is done."""
        if cell.spec is None:
            return 0.0
        points = self._store.by_fingerprint(cell.spec.fingerprint).curve()
        return float(points[-1]["step"]) / cell.spec.budget.steps if points else 0.0

    def _drawn(self) -> Any:
        from rich.table import Table

        lines = table(self._plan)
        drawn = Table(title=self._summary(), title_justify="left")
        for column in lines[0]:
            drawn.add_column(column, overflow="fold")
        cells = [[] for _ in self._plan.heads] + [row["cells"] for row in rows_of(self._plan)]
        for line, own in zip(lines, cells, strict=True):
            drawn.add_row(*_escaped({**line, "state": line["state"] + self._progress(own)}))
        return drawn

    def _progress(self, cells: list[PlannedCell]) -> str:
        """The steps of all running cells, from their folders."""
        steps = []
        for cell in cells:
            if cell.state is RunState.RUNNING and cell.fingerprint is not None:
                points = self._store.by_fingerprint(cell.fingerprint).curve()
                steps.append(f"{points[-1]['step'] if points else 0}")
        return f" (step {', '.join(steps)} of {self._plan.study.the_budget().steps})" if steps else ""


def trials_so_far(search: Search) -> str:
    """One line: the number of trials and the best one."""
    ended = [trial for trial in search.trials if trial.state != "running"]
    best = search.folder.best(len(search.trials))
    values = f", best {', '.join(f'{value:.4g}' for value in best.values or ())} (trial {best.number})" if best else ""
    running = len(search.trials) - len(ended)
    return f"search {search.spec.name}: {counted(len(ended), 'trial')} ended, {running} running{values}"


def _title(cell: PlannedCell) -> str:
    request = cell.request
    label = shown_label(cell.label, [request.head])
    return f"{label} on {request.backbone}, {Path(request.dataset).name}, {request.head}, seed {request.seed}"


def _escaped(line: dict[str, str]) -> list[str]:
    from rich.markup import escape

    return [escape(text) for text in line.values()]


def as_json(plan: Plan) -> list[dict[str, Any]]:
    """Every cell as plain values."""
    return [
        {
            "label": cell.label,
            "fingerprint": cell.fingerprint,
            **{name: getattr(cell.request, name) for name in ("method", "backbone", "dataset", "head", "seed")},
            "settings": cell.request.settings,
            "state": cell.state,
            "reason": cell.reason,
            "miou": cell.miou,
        }
        for cell in plan.cells
    ]
