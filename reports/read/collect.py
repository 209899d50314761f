"""What a report is made of, read from run folders: one row a run, its classes, its curve, its matrices.

Reads and trains nothing. A folder that cannot be read is listed with its reason and never stops the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.models.backbones.packaged import display_name
from harness.runs.folder import RunFolder
from harness.runs.metrics import load_confusions
from harness.runs.result import RunResult
from harness.runs.store import RunStore
from harness.spec import Budget, budget
from reports.analysis.statistics import image_counts
from reports.read.frames import FACETS, frame_of_classes, frame_of_curves, frame_of_runs
from reports.read.results import RunRow, facets_of_budget, read_json, read_run, row_of_run, row_of_spec

if TYPE_CHECKING:
    from studies.plan import Plan, PlannedCell


@dataclass(frozen=True)
class Skipped:
    """A folder that is not in the report, and why."""

    folder: str
    reason: str


@dataclass(frozen=True)
class SearchRecord:
    """One folder under RUNS/searches/: what was searched, every trial, and which hyperparameters mattered."""

    name: str
    definition: dict[str, Any]
    """The fields of `studies.search.spec.SearchSpec`, as JSON has them."""
    trials: pd.DataFrame
    """The fields of `studies.search.spec.Trial`; `settings` are dicts, `values` lists or None."""
    importances: dict[str, float]
    path: Path


@dataclass(frozen=True)
class Collected:
    """Everything a report shows.

    `runs` holds the fields of `RunRow` plus `setting`, a short id that is equal for runs which may stand in one table
    or panel, and `setting_name`, which says it in words with as much as tells it from the others. Sorted by setting,
    label and seed.
    """

    runs: pd.DataFrame
    per_class: pd.DataFrame
    """fingerprint, index, name, iou, acc, dice, colour ("#rrggbb" or None)."""
    curves: pd.DataFrame
    """fingerprint, step, loss, lr, miou_train, images_per_second."""
    searches: list[SearchRecord]
    skipped: list[Skipped]
    root: Path

    @property
    def reported(self) -> pd.DataFrame:
        """The rows of tables and plots: a search's trials, scored on the dev part, are not among them."""
        return self.runs[self.runs["part"] == "report"]

    def confusions(self, fingerprint: str) -> tuple[list[str], np.ndarray]:
        """A run's images and their confusion matrices, int64 [N, K, K]. Raises `UserError` where they are damaged.

        Read at every call: those of one run on ADE20K take 360 MB.
        """
        try:
            return load_confusions(RunFolder(self.root / fingerprint).confusions_path)
        except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
            told = f"run {fingerprint}: its confusions.npz is missing or damaged; repeat it with --again"
            raise UserError(told) from error

    def counts(self, fingerprint: str) -> tuple[list[str], np.ndarray]:
        """A run's images and int64 [N, 3, K] of them, which is all that figures and statistics need."""
        names, matrices = self.confusions(fingerprint)
        return names, image_counts(matrices)

    def select(self, chosen: pd.Series) -> Collected:
        """The part of it that a mask over `runs` chooses."""
        runs = self.runs[chosen].reset_index(drop=True)
        kept = set(runs["fingerprint"].dropna())
        return replace(
            self,
            runs=runs,
            per_class=self.per_class[self.per_class["fingerprint"].isin(kept)].reset_index(drop=True),
            curves=self.curves[self.curves["fingerprint"].isin(kept)].reset_index(drop=True),
        )


def collect(root: Path, study: Path | None = None, data: Path = Path("data")) -> Collected:
    """Read every run under `root`; with a study, those of its cells alone, and a row for each cell without a run.

    Raises `UserError` where there is no such folder, or nothing in it to report.
    """
    if not root.is_dir():
        raise UserError(f"--runs {root}: no such folder")
    store = RunStore(root)
    skipped: list[Skipped] = []
    searches = list(_searches(root, skipped))
    cells: list[PlannedCell] = []
    if study is not None:
        plan = _plan(study, store, data)
        cells, served = plan.cells, {search.folder.path.name for search in plan.searches}
        searches = [search for search in searches if search.name in served]
    wanted = {cell.spec.fingerprint for cell in cells if cell.spec is not None}
    wanted |= {fingerprint for search in searches for fingerprint in search.trials["fingerprint"]}

    read: dict[str, RunRow] = {}
    results: dict[str, RunResult] = {}
    for run in store:
        if study is not None and run.fingerprint not in wanted:
            continue
        try:
            spec, result, state, reason = read_run(run, store)
        except UserError as error:
            skipped.append(Skipped(run.fingerprint, str(error).removeprefix(f"{run.path}: ")))
            continue
        read[run.fingerprint] = row_of_run(run, spec, result, state, reason)
        if result is not None:
            results[run.fingerprint] = result
    rows = list(read.values())
    if study is not None:
        rows = _rows_of_study(cells, read) + [row for row in rows if row.part == "dev"]
    if not rows and not skipped:
        raise UserError(f"--runs {root}: holds no runs; `harness run` and `harness compare` make them")
    return Collected(
        runs=frame_of_runs(rows, labelled=study is not None),
        per_class=frame_of_classes(root, results),
        curves=frame_of_curves(root, results),
        searches=searches,
        skipped=skipped,
        root=root,
    )


def _plan(study: Path, store: RunStore, data: Path) -> Plan:
    from studies.plan import make_plan
    from studies.study import load_study

    return make_plan(load_study(study), store, data)


def _rows_of_study(cells: Iterable[PlannedCell], read: dict[str, RunRow]) -> list[RunRow]:
    """A row a cell: its run's, or one without figures.

    A cell whose hyperparameters a search has yet to choose has no spec; it takes its place from its neighbours.
    """
    rows: list[RunRow] = []
    places: dict[tuple[str, ...], RunRow] = {}
    waiting: list[PlannedCell] = []
    for cell in cells:
        if cell.spec is None:
            waiting.append(cell)
            continue
        fingerprint = cell.spec.fingerprint
        without = row_of_spec(cell.spec, _state_without_run(cell), _reason_without_run(cell), fingerprint=fingerprint)
        rows.append(replace(read.get(fingerprint, without), label=cell.label))
        places[_place(cell)] = rows[-1]
    for cell in waiting:
        request, neighbour = cell.request, places.get(_place(cell))
        facets = {
            "dataset": Path(request.dataset).name,
            "data_digest": "",
            "backbone": display_name(request.backbone, request.weights),
            "weights": request.weights,
            "head": request.head,
            "part": request.part,
            **facets_of_budget(request.budget if isinstance(request.budget, Budget) else budget(request.budget)),
        }
        if neighbour is not None:
            facets = {name: getattr(neighbour, name) for name in FACETS}
        rows.append(
            RunRow(
                fingerprint=None,
                label=cell.label,
                method=request.method,
                hyperparameters=json.dumps(request.settings, sort_keys=True),
                method_code="",
                seed=request.seed,
                state=_state_without_run(cell),
                reason=_reason_without_run(cell),
                **facets,
            )
        )
    return rows


def _place(cell: PlannedCell) -> tuple[str, ...]:
    request = cell.request
    return request.backbone, request.weights, request.dataset, request.head, request.budget, request.part


def _reason_without_run(cell: PlannedCell) -> str | None:
    return cell.reason or _NOT_RUN.get(cell.state)


def _state_without_run(cell: PlannedCell) -> str:
    return "missing" if cell.state in _NOT_RUN else cell.state


_NOT_RUN = {"to do": "never begun", "waiting": "its search has not ended", "done": None}
"""What a plan says of cells that a report calls missing, and the reason that it gives."""


def _searches(root: Path, skipped: list[Skipped]) -> Iterator[SearchRecord]:
    """Every search that can be read; the others are added to `skipped`."""
    from studies.search.spec import SearchSpec, Trial

    columns = [column.name for column in fields(Trial)]
    for path in sorted((root / "searches").glob("*/")):
        if path.name.startswith(".") or not (path / "trials.json").exists():  # none has ended yet
            continue
        try:
            definition = read_json(path / "search.json", SearchSpec)
            trials = read_json(path / "trials.json", list[Trial])
            found = path / "importances.json"
            importances = read_json(found, dict[str, float]) if found.exists() else {}
        except UserError as error:
            skipped.append(Skipped(f"searches/{path.name}", str(error)))
            continue
        frame = pd.DataFrame([asdict(trial) for trial in trials], columns=columns)
        yield SearchRecord(path.name, definition.model_dump(mode="json"), frame, importances, path)
