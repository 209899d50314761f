"""Reads the content of a report from run folders: runs, their classes, curves and confusion matrices, and searches.

Writes nothing. A folder that cannot be read is listed with the reason; the others are reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.models.backbones.packaged import display_name
from harness.runs.difference import image_counts
from harness.runs.folder import RunFolder
from harness.runs.metrics import ImageConfusions, read_confusions
from harness.runs.result import Provenance
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.spec import Budget, budget
from reports.read.frames import FACETS, frame_of_classes, frame_of_curves, frame_of_runs
from reports.read.rows import RunRow, budget_fields, read_json, read_row, row_of_spec
from studies.plan import Plan, PlannedCell, make_plan
from studies.search.spec import SearchSpec, Trial
from studies.study import load_study


@dataclass(frozen=True)
class Skipped:
    """A folder that is not in the report, and why."""

    folder: str
    reason: str


@dataclass(frozen=True)
class SearchRecord:
    """One folder under RUNS/searches/: its definition, every trial, and the importance of each hyperparameter."""

    name: str
    definition: dict[str, Any]
    """The fields of `studies.search.spec.SearchSpec`, as JSON has them."""
    trials: pd.DataFrame
    """The fields of `studies.search.spec.Trial`; `settings` are dicts, `values` lists or None."""
    importances: dict[str, float]


@dataclass(frozen=True)
class ImageCounts:
    """What scores need of a run's images."""

    names: list[str]
    groups: list[str] | None
    """Of each image; None where the run does not record them."""
    counts: np.ndarray
    """int64 [N, 3, K]: see `image_counts`."""


@dataclass(frozen=True)
class Collected:
    """Everything a report shows.

    `runs` holds the fields of `RunRow` but `result`, every measure of `harness.runs.result`, absent_classes, data_wait,
    commit, dirty, device, unlabelled, only_found and warnings, and two columns that say which runs are comparable:
    `setting`, a short id that is equal for runs in one table or panel, and `setting_name`, the same in words. Sorted by
    setting, label and seed.
    """

    runs: pd.DataFrame
    per_class: pd.DataFrame
    """As `frame_of_classes` has it."""
    curves: pd.DataFrame
    """As `frame_of_curves` has it."""
    provenance: dict[str, Provenance]
    """By fingerprint, of runs that are done."""
    files: dict[str, dict[str, str]]
    """By fingerprint: the SHA-256 of the run's files when it ended."""
    searches: list[SearchRecord]
    skipped: list[Skipped]
    root: Path

    @property
    def reported(self) -> pd.DataFrame:
        """The rows of tables and plots: without the trials of searches, which are scored on the dev split."""
        return self.runs[self.runs["part"] == "report"]

    @property
    def finished(self) -> pd.DataFrame:
        """The reported runs that have an mIoU."""
        runs = self.reported
        return runs[(runs["state"] == RunState.DONE) & runs["miou"].notna()]

    @cached_property
    def class_names(self) -> dict[str, list[str]]:
        """By fingerprint, in the order of the classes."""
        return {str(run): list(names) for run, names in self.per_class.groupby("fingerprint")["name"]}

    def confusions(self, fingerprint: str) -> ImageConfusions:
        """The confusion matrices of a run's images. Raises `UserError` if they are damaged.

        Not cached: those of one run on ADE20K take 360 MB.
        """
        path, classes = RunFolder(self.root / fingerprint).confusions_path, self.class_names.get(fingerprint)
        try:
            if classes is None:
                raise UserError("has no score per class")
            return read_confusions(path, self.files.get(fingerprint, {}), len(classes))
        except UserError as error:
            raise UserError(f"run {fingerprint}: {error}") from error

    def counts(self, fingerprint: str) -> ImageCounts:
        """The pixel counts of a run's images."""
        read = self.confusions(fingerprint)
        return ImageCounts(read.names, read.groups, image_counts(read.matrices))

    def select(self, mask: pd.Series) -> Collected:
        """The runs that a mask over `runs` selects, with their classes, curves and searches."""
        runs = self.runs[mask].reset_index(drop=True)
        selected = set(runs["fingerprint"].dropna())
        return replace(
            self,
            runs=runs,
            per_class=self.per_class[self.per_class["fingerprint"].isin(selected)].reset_index(drop=True),
            curves=self.curves[self.curves["fingerprint"].isin(selected)].reset_index(drop=True),
        )


def collect(root: Path, study: Path | None = None, data: Path = Path("data")) -> Collected:
    """Read every run under `root`; with a study only those of its cells, and a row for each cell without a run.

    Raises `UserError` if the folder does not exist or has nothing to report.
    """
    if not root.is_dir():
        raise UserError(f"--runs {root}: no such folder")
    store = RunStore(root)
    skipped: list[Skipped] = []
    searches = list(_searches(root, skipped))
    plan = None if study is None else make_plan(load_study(study), store, data)
    if plan is not None:
        folders = (search.folder for search in (*plan.heads, *plan.searches))
        planned = {folder.path.name for folder in folders if folder is not None}
        searches = [search for search in searches if search.name in planned]
    wanted = None if plan is None else _fingerprints(plan, searches)

    rows: dict[str, RunRow] = {}
    for run in store:
        if wanted is not None and run.fingerprint not in wanted:
            continue
        try:
            rows[run.fingerprint] = read_row(run, store)
        except UserError as error:
            skipped.append(Skipped(run.fingerprint, str(error).removeprefix(f"{run.path}: ")))
    results = {fingerprint: row.result for fingerprint, row in rows.items() if row.result is not None}
    shown = list(rows.values())
    if plan is not None:
        shown = _rows_of_study(plan, rows) + [row for row in shown if row.part == "dev"]
    if not shown and not skipped:
        raise UserError(f"--runs {root}: holds no runs; create some with `harness run` or `harness compare`")
    return Collected(
        runs=frame_of_runs(shown, labelled=plan is not None),
        per_class=frame_of_classes(root, results),
        curves=frame_of_curves(root, results),
        provenance={fingerprint: result.provenance for fingerprint, result in results.items()},
        files={fingerprint: result.files for fingerprint, result in results.items()},
        searches=searches,
        skipped=skipped,
        root=root,
    )


def _fingerprints(plan: Plan, searches: Iterable[SearchRecord]) -> set[str]:
    """The fingerprints of the runs of a study's cells and of its searches' trials."""
    cells = {cell.spec.fingerprint for cell in plan.cells if cell.spec is not None}
    trials = (search.trials for search in searches)
    return cells.union(*(one for frame in trials for one in (frame["fingerprint"], *frame["others"])))


def _rows_of_study(plan: Plan, read: dict[str, RunRow]) -> list[RunRow]:
    """One row per cell: its run's, or one without a result.

    A cell whose search has not ended has no spec yet; its setting is that of its neighbours.
    """
    rows: list[RunRow] = []
    neighbours: dict[tuple[str, ...], RunRow] = {}
    without_spec: list[PlannedCell] = []
    doubts = {
        id(cell): ", ".join([*search.own_ranges(), *search.doubts()])
        for search in plan.searches
        for cell in search.cells
    }
    for cell in plan.cells:
        if cell.spec is None:
            without_spec.append(cell)
            continue
        fingerprint = cell.spec.fingerprint
        absent = row_of_spec(cell.spec, _outcome_without_run(cell), fingerprint=fingerprint)
        rows.append(replace(read.get(fingerprint, absent), label=cell.label, doubts=doubts.get(id(cell), "")))
        neighbours[_setting_of(cell)] = rows[-1]
    for cell in without_spec:
        request, neighbour, outcome = cell.request, neighbours.get(_setting_of(cell)), _outcome_without_run(cell)
        facets = {
            "dataset": Path(request.dataset).name,
            "data_digest": "",
            "backbone": display_name(request.backbone, request.weights),
            "weights": request.weights,
            "head": request.head,
            "part": request.part,
            **budget_fields(request.budget if isinstance(request.budget, Budget) else budget(request.budget)),
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
                state=outcome.state,
                reason=outcome.reason,
                **facets,
            )
        )
    return rows


def _setting_of(cell: PlannedCell) -> tuple[str, ...]:
    request = cell.request
    return request.backbone, request.weights, request.dataset, request.head, str(request.budget), request.part


def _outcome_without_run(cell: PlannedCell) -> Outcome:
    """The outcome of a cell whose run was not read."""
    state = RunState(cell.state)
    if state is RunState.DONE:  # its folder disappeared after planning
        return Outcome(RunState.TO_DO)
    reasons = {RunState.TO_DO: "never started", RunState.WAITING: "its search has not ended"}
    return Outcome(state, cell.reason or reasons.get(state))


def _searches(root: Path, skipped: list[Skipped]) -> Iterator[SearchRecord]:
    """Every readable search; the others are added to `skipped`."""
    columns = [column.name for column in fields(Trial)]
    for path in sorted((root / "searches").glob("*/")):
        if path.name.startswith(".") or not (path / "trials.json").exists():  # no trial has ended yet
            continue
        try:
            definition = read_json(path / "search.json", SearchSpec)
            trials = read_json(path / "trials.json", list[Trial])
            importances_path = path / "importances.json"
            importances = read_json(importances_path, dict[str, float]) if importances_path.exists() else {}
        except UserError as error:
            skipped.append(Skipped(f"searches/{path.name}", str(error)))
            continue
        frame = pd.DataFrame([asdict(trial) for trial in trials], columns=columns)
        yield SearchRecord(path.name, definition.model_dump(mode="json"), frame, importances)
