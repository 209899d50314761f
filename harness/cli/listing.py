"""What `harness list` prints: rows of plain values, the same for people and for `--json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.runs.folder import RunFolder
from harness.runs.store import RunStore
from harness.spec import Spec


def rows(what: str, runs: Path, data: Path) -> list[dict[str, Any]]:
    """One row a method, backbone, dataset, head, budget or run."""
    return {
        "methods": _methods,
        "backbones": _backbones,
        "datasets": lambda: _datasets(data),
        "heads": _heads,
        "budgets": _budgets,
        "runs": lambda: _runs(runs),
    }[what]()


def _methods() -> list[dict[str, Any]]:
    from harness.method import methods

    listed = []
    for name in methods.names():
        try:
            method = methods.get(name)
        except UserError as error:  # a plug-in that is broken is named; the rest goes on
            listed.append({"name": name, "summary": f"broken: {error}", "source": "", "hyperparameters": []})
            continue
        described = method.Hyperparameters.describe()
        listed.append(
            {"name": name, "summary": method.summary, "source": method.source, "hyperparameters": described}
        )  # fmt: skip
    return listed


def _backbones() -> list[dict[str, Any]]:
    from harness.models.backbones.families import backbone_names, families

    return [{"name": name, "family": family} for family in families() for name in backbone_names(family)]


def _datasets(data: Path) -> list[dict[str, Any]]:
    from harness.data.catalog import dataset_names

    return [
        {"name": entry.name, "kind": entry.kind, "there": entry.present, "expected at": str(entry.location)}
        for entry in dataset_names(data)
    ]


def _heads() -> list[dict[str, Any]]:
    from harness.models.heads import heads

    return [{"name": name, "what": (heads.get(name).__doc__ or "").split("\n")[0]} for name in heads.names()]


def _budgets() -> list[dict[str, Any]]:
    from harness.spec import budgets

    return [chosen.model_dump(mode="json") for chosen in budgets().values()]


def _runs(runs: Path) -> list[dict[str, Any]]:
    store = RunStore(runs)
    listed = [_run(run, store) for run in store]
    return sorted(
        listed,
        key=lambda row: [row["spec"][key] for key in ("dataset", "backbone", "head", "method", "seed")],
    )


def _run(run: RunFolder, store: RunStore) -> dict[str, Any]:
    if (result := run.result()) is not None:
        return result.model_dump(mode="json")
    outcome = store.outcome(run)
    try:
        spec = run.spec().model_dump(mode="json")
    except UserError as error:
        spec = dict.fromkeys(Spec.model_fields, "?") | {
            "hyperparameters": {},
            "budget": {"name": "?"},
            "seed": -1,
        }
        return {"status": "damaged", "reason": str(error), "fingerprint": run.fingerprint, "spec": spec}
    return {
        "status": outcome.state.value,
        "reason": outcome.reason,
        "fingerprint": run.fingerprint,
        "spec": spec,
    }
