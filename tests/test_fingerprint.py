"""The fingerprint changes with every field that can change a result, and with no other."""

from __future__ import annotations

import shutil
from pathlib import Path

from harness.cells.resolve import resolve
from harness.runs.store import RunStore
from harness.spec import Budget, Spec, budget
from tests.support.run_commands import request

SPEC = Spec(
    method="spm",
    hyperparameters={"lr": 0.001, "hidden": 32},
    backbone="resnet10t",
    weights="random",
    dataset="colours",
    data_digest="0" * 64,
    head="fpn",
    budget=Budget(name="tiny", steps=12, batch_size=4, crop=(32, 32)),
    seed=0,
)
OTHER = {
    "method": "full",
    "hyperparameters": {"lr": 0.001, "hidden": 16},
    "method_code": "sha256:" + "2" * 64,
    "backbone": "resnet18",
    "weights": "timm:resnet10t.c3_in1k",
    "data_digest": "1" * 64,
    "head": "fpn:16",
    "seed": 1,
    "part": "dev",
}
OTHER_BUDGET = {
    "steps": 13,
    "batch_size": 8,
    "accumulate": 2,
    "crop": (32, 64),
    "resize": (0.5, 1.0),
    "flip": 0.0,
    "photometric": False,
    "warmup": 1,
    "power": 1.0,
    "clip_norm": 0.0,
    "precision": "bf16",
    "dev_fraction": 0.5,
    "channels_last": True,
}
SLIDE = {"evaluation": "slide", "stride": (16, 16)}


def test_every_field_that_changes_results_changes_the_fingerprint() -> None:
    changed = [SPEC.model_copy(update={field: value}) for field, value in OTHER.items()]
    budgets = [SPEC.budget.model_copy(update={field: value}) for field, value in OTHER_BUDGET.items()]
    budgets += [SPEC.budget.model_copy(update=SLIDE), SPEC.budget.model_copy(update=SLIDE | {"stride": (8, 8)})]
    changed += [SPEC.model_copy(update={"budget": other}) for other in budgets]
    # model_copy keeps what was computed, so each is built anew.
    prints = {Spec.model_validate(spec.model_dump()).fingerprint for spec in [SPEC, *changed]}
    assert len(prints) == 1 + len(changed)


def test_later_fields_leave_older_fingerprints_unchanged() -> None:
    assert SPEC.fingerprint == "933fb48d020bbaec"


def test_no_field_is_missing_above() -> None:
    assert Spec.model_fields.keys() == OTHER.keys() | {"budget", "dataset"}
    assert Budget.model_fields.keys() == OTHER_BUDGET.keys() | SLIDE.keys() | {"name"}


def test_names_and_paths_do_not_change_the_fingerprint(colours: Path, tiny: Path, tmp_path: Path) -> None:
    here = resolve(request(colours, tiny), RunStore(tmp_path / "a"), tmp_path).spec
    moved = Path(shutil.copytree(colours, tmp_path / "data" / "renamed"))
    renamed = Path(shutil.copy(tiny, tmp_path / "renamed.yaml"))
    assert budget(str(renamed)).name == "renamed"
    there = resolve(request(moved, renamed), RunStore(tmp_path / "b"), tmp_path / "data").spec
    assert (here.dataset, here.budget.name) != (there.dataset, there.budget.name)
    assert here.fingerprint == there.fingerprint
