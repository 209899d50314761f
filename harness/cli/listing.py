"""The rows of `harness list`: plain values, the same for the tables and for `--json`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from harness.cli.tables import hyperparameter_row, plain, print_table, run_row
from harness.errors import UserError, did_you_mean
from harness.runs.folder import RunFolder
from harness.runs.result import RunResult
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.spec import Spec

Listed = Literal["methods", "backbones", "datasets", "heads", "budgets", "runs"]
ListedRow = dict[str, Any]


@dataclass(frozen=True)
class ListedRun:
    """The content of a run folder: `spec` is None if it cannot be read, `result` is None if the run is not done."""

    fingerprint: str
    outcome: Outcome
    spec: Spec | None
    result: RunResult | None

    @classmethod
    def of(cls, run: RunFolder, store: RunStore) -> ListedRun:
        outcome, result = store.read(run)
        try:
            return cls(run.fingerprint, outcome, result.spec if result else run.spec(), result)
        except UserError as error:
            return cls(run.fingerprint, Outcome(RunState.DAMAGED, str(error)), None, None)

    def as_json(self) -> ListedRow:
        if self.result is not None:
            return self.result.model_dump(mode="json")
        spec = None if self.spec is None else self.spec.model_dump(mode="json")
        state, reason = self.outcome.state.value, self.outcome.reason
        return {"status": state, "reason": reason, "fingerprint": self.fingerprint, "spec": spec}

    def names(self) -> tuple[str, ...]:
        """The texts that a pattern is matched against."""
        spec = self.spec
        cell = () if spec is None else (spec.method, spec.backbone, spec.dataset, spec.head, spec.budget.name)
        return (self.fingerprint, self.outcome.state.value, *cell)

    def order(self) -> tuple[Any, ...]:
        spec = self.spec
        return ("",) if spec is None else (spec.dataset, spec.backbone, spec.head, spec.method, spec.seed)


def list_rows(kind: Listed, data: Path, pattern: str | None = None, pretrained: bool = False) -> list[ListedRow]:
    """One row per method, backbone, dataset, head or budget whose name matches `pattern` (`*`, `?`, `[...]`).

    Raises `UserError` if none matches.
    """
    listers: dict[str, Callable[[], list[ListedRow]]] = {
        "methods": _methods,
        "backbones": lambda: _backbones(pretrained),
        "datasets": lambda: _datasets(data),
        "heads": _heads,
        "budgets": _budgets,
    }
    rows = listers[kind]()
    matching = [row for row in rows if pattern is None or fnmatchcase(row["name"], pattern)]
    if pattern is not None and not matching:
        raise _no_match(kind, pattern, [row["name"] for row in rows], pretrained)
    return matching


def list_runs(store: RunStore, pattern: str | None = None) -> list[ListedRun]:
    """The runs whose fingerprint, state, method, backbone, dataset, head or budget matches.

    Raises `UserError` if there are runs and none matches.
    """
    runs = sorted((ListedRun.of(run, store) for run in store), key=ListedRun.order)
    matching = [run for run in runs if pattern is None or any(fnmatchcase(name, pattern) for name in run.names())]
    if pattern is not None and runs and not matching:
        raise _no_match("runs", pattern, sorted({name for run in runs for name in run.names()}))
    return matching


def print_rows(kind: Listed, rows: list[ListedRow], pattern: str | None) -> None:
    """Print a table, or the details of one method or budget that is named without wildcards."""
    if kind == "budgets" and [row["name"] for row in rows] == [pattern]:
        (budget,) = rows
        print_table([{"field": key, "value": str(plain(value)), "meaning": described}
                     for key, value, described in _budget_fields(budget)])  # fmt: skip
    elif kind != "methods":
        print_table([{key: plain(value) for key, value in row.items()} for row in rows])
    elif [row["name"] for row in rows] == [pattern]:
        (method,) = rows
        print(f"{method['name']}: {method['summary']}\n  {method['source']}")
        print_table([hyperparameter_row(described) for described in method["hyperparameters"]], indent="  ")
    else:
        print_table([{"name": row["name"], "summary": row["summary"]} for row in rows])


def print_runs(runs: list[ListedRun]) -> None:
    print_table([run_row(run) for run in runs])


def _no_match(kind: str, pattern: str, names: list[str], pretrained: bool = False) -> UserError:
    which = " --pretrained" if pretrained else ""
    wider = f"*{pattern}*"
    contained = any(fnmatchcase(name, wider) for name in names)
    hint = f"did you mean '{wider}'?" if contained else did_you_mean(pattern.strip("*?"), names)
    return UserError(f"list {kind} {pattern}{which}: no match; {hint}")


def _methods() -> list[ListedRow]:
    from harness.method import methods

    listed: list[ListedRow] = []
    for name in methods.names():
        try:
            method = methods.get(name)
        except UserError as error:  # a broken plugin is a row; the others are listed
            listed.append({"name": name, "summary": f"broken: {error}", "source": "", "hyperparameters": []})
            continue
        row: ListedRow = {"name": name, "summary": method.summary, "source": method.source}
        listed.append(row | {"hyperparameters": method.Hyperparameters.describe()})
    return listed


def _backbones(pretrained: bool) -> list[ListedRow]:
    from harness.models.backbones.families import backbone_names, families

    rows = [{"name": name, "family": family} for family in families() for name in backbone_names(family)]
    if not pretrained:
        return rows
    from harness.models.backbones.local_weights import local_weights

    found = local_weights([row["name"] for row in rows])
    return [row | found[row["name"]] for row in rows if row["name"] in found]


def _datasets(data: Path) -> list[ListedRow]:
    from harness.data.catalog import dataset_names

    return [
        {"name": entry.name, "kind": entry.kind, "present": entry.present, "location": str(entry.location)}
        for entry in dataset_names(data)
    ]


def _heads() -> list[ListedRow]:
    from harness.models.heads import heads

    return [{"name": name, "summary": (heads.get(name).__doc__ or "").split("\n")[0]} for name in heads.names()]


def _budget_fields(values: ListedRow) -> list[tuple[str, Any, str]]:
    """Name, value and meaning of each field of a budget."""
    from harness.spec import Budget

    fields = Budget.model_fields.items()
    return [(name, values[name], field.description or "") for name, field in fields if name != "name"]


def _budgets() -> list[ListedRow]:
    from harness.spec import budgets

    return [budget.model_dump(mode="json") for budget in budgets().values()]
