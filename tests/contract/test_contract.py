"""Every registered method fulfils the contract on a tiny network of every family, and violations are detected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import method
from harness.contract import checks, matrix
from harness.contract.checks import CHECKS, FOUNDATIONS
from harness.contract.matrix import CheckResult, broken, check_method, run_check, tiny_backbones
from harness.errors import UserError
from harness.method import Method, hyperparameter, methods
from harness.models.backbones.families import families
from tests.support.broken_methods import (
    ChangesWhatItIsAskedAbout,
    ConvolutionsOnly,
    CopiesTheBackbone,
    CountsOnContiguousMaps,
    Crashes,
    CrashesInTraining,
    Explodes,
    FullPrecisionOnly,
    Good,
    HeadOnly,
    MovesStatistics,
    NeverUsed,
    Nothing,
    NoWithoutReason,
    OtherStart,
    OtherStartAndSaysSo,
    OutsideTheDelta,
    Random,
    Remembers,
    RightForOneNumberOfClasses,
    Shared,
    Unfrozen,
    WrongCount,
)
from tests.support.short_plugin import SCALE
from tests.support.tiny_jobs import loaded

torch.set_num_threads(1)  # for networks this small


CNN, VIT = "resnet", "vision_transformer"
VARIANTS = {"dora", "hra", "ia3", "loha", "lokr", "oft"}
"""They share `lora`'s module, which represents them on the CNN, and two of them the others on the ViT."""
TWO_VARIANTS = {"dora", "lokr"}
ON_ONE = {"adaptformer": VIT, "convpass": VIT, "fact": VIT, "repadapter": VIT, "vpt_deep": VIT, "vpt_shallow": VIT,
          "conv_adapter": CNN}  # fmt: skip
"""Methods that answer on the other with a reason."""


def _pairs() -> Iterator[Any]:
    """Methods that support both networks alternate between them; the long tests use both."""
    both = [name for name in methods.names() if name not in VARIANTS and name not in ON_ONE]
    at_length = {(name, (CNN, VIT)[place % 2]) for place, name in enumerate(both)}
    for name in methods.names():
        for family in (VIT,) if name in VARIANTS else (CNN, VIT):
            late = (name, family) in at_length or name in VARIANTS - TWO_VARIANTS
            marks = [pytest.mark.exhaustive] if late else []
            yield pytest.param(name, family, marks=marks)


@pytest.mark.parametrize(("name", "family"), _pairs())
def test_every_method_fulfils_the_contract(name: str, family: str) -> None:
    """On all families: `harness check --all`, which takes as long as the whole of the tests."""
    assert broken(check_method(name, [tiny_backbones()[family]])) == []


@pytest.fixture(scope="module")
def scale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "scale.py"
    path.write_text(SCALE, encoding="utf-8")
    return path


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_method_in_one_short_file_passes(scale: Path, backbone: str) -> None:
    assert len(SCALE.splitlines()) < 40
    with loaded(scale):
        assert "channel_scale" in methods.names()
        outcomes = check_method("channel_scale", [backbone])
    assert broken(outcomes) == []
    assert outcomes[-1].check == "finishes in two processes"


def test_every_family_has_a_tiny_network() -> None:
    assert set(families()) == set(tiny_backbones())


def knobs(**fields: object) -> type[Method]:
    annotations = {name: type(field.default) for name, field in fields.items()}
    own = type("Hyperparameters", (method.Hyperparameters,), {**fields, "__annotations__": annotations})
    return type("Knobs", (Good,), {"Hyperparameters": own})


def verdict(cls: type[Method], backbone: str = "test_resnet") -> list[str]:
    return [f"{outcome.check}: {outcome.detail}" for outcome in broken(check_method(cls, [backbone]))]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_good_method_passes_every_check(backbone: str) -> None:
    outcomes = check_method(Good, [backbone])
    assert [outcome.check for outcome in outcomes[1:]] == [check.__name__.replace("_", " ") for check in CHECKS]
    assert {outcome.status for outcome in outcomes} == {"ok"}


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (
            Unfrozen,
            "trains the declared number of parameters: good on test_resnet: trains 0 parameters, but its closed form",
        ),
        (
            MovesStatistics,
            "keeps frozen tensors unchanged: changes frozen tensors: stem.0.1.running_mean, stem.0.1.running_var",
        ),
        (
            WrongCount,
            "trains the declared number of parameters: good on test_resnet: trains 1056 parameters, but its closed",
        ),
        (
            RightForOneNumberOfClasses,
            "trains the declared number of parameters: good on test_resnet: trains 1056 parameters",
        ),
        (Shared, "shares no state between instances: training one instance changes another: backbone.gaps.0.mix"),
        (Nothing, "trains the declared number of parameters: trains nothing here; return Unsupported"),
        (Crashes, "trains the declared number of parameters: crashes: KeyError: 'layer5'"),
        (CrashesInTraining, "trains: crashes: RuntimeError: no maps"),
        (Random, "is deterministic at a seed: two builds from one seed differ: backbone.gaps.0.mix.weight"),
        (OtherStart, "starts as the frozen backbone: the map of stage 0 differs at the start by 1"),
        (NeverUsed, "gives every trained parameter a gradient: no gradient reaches backbone.gaps.0.spare"),
        (Remembers, "trains: crashes: RuntimeError: Trying to backward through the graph a second time"),
        (OutsideTheDelta, "is rebuilt from its delta: logits differ"),
        (CopiesTheBackbone, "is rebuilt from its delta: the delta holds copies of pre-trained tensors"),
        (FullPrecisionOnly, "works in mixed precision: crashes: TypeError: expected float32"),
        (CountsOnContiguousMaps, "works in channels last: crashes: RuntimeError: view size is not compatible"),
        (Explodes, "overfits four images: does not overfit four images"),
        (NoWithoutReason, "declares support: supports returns False"),
        (ChangesWhatItIsAskedAbout, "declares support: supports changes the backbone"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_check_catches_the_method_that_breaks_it(
    cls: type[Method], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = expected.partition(":")[0].replace(" ", "_")
    monkeypatch.setattr(matrix, "CHECKS", [check for check in CHECKS if check in FOUNDATIONS or check.__name__ == name])
    if cls is Explodes:  # a good method needs a few steps, and one that never ends needs no more
        monkeypatch.setattr(checks, "OVERFIT_STEPS", 20)
        assert verdict(Good) == []
    found = verdict(cls)
    assert any(line.startswith(expected) for line in found), found


@pytest.mark.parametrize("cls", [HeadOnly, OtherStartAndSaysSo])
def test_declared_exceptions_are_accepted(cls: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "TWO_PROCESSES_ON", ())
    assert verdict(cls) == []


@pytest.mark.exhaustive
def test_unused_parameter_fails_in_two_processes() -> None:
    assert any("two processes: one of two processes failed" in line for line in verdict(NeverUsed))
    assert verdict(Good) == []


def test_unsupported_backbone_is_one_result_with_the_reason() -> None:
    outcomes = check_method(ConvolutionsOnly, ["test_vit"])
    assert outcomes[1:] == [CheckResult("declares support", "test_vit", "unsupported", "for CNNs")]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (hyperparameter(1, "", ge=0, le=2), "hyperparameter x has no help"),
        (hyperparameter(1, "help", ge=0), "hyperparameter x has no upper bound"),
        (hyperparameter(1.0, "help", lt=9), "hyperparameter x has no lower bound"),
        (hyperparameter("a", "help"), "hyperparameter x accepts any text; add a pattern or use a Literal"),
        (hyperparameter(1, "help", ge=0, le=2, search=(1, 3)), "hyperparameter x: its search draws 3, out of bounds"),
        (hyperparameter(5, "help", ge=0, le=2), "crashes: ValidationError"),
    ],
)
def test_incomplete_hyperparameter_is_rejected(field: object, expected: str) -> None:
    (line,) = verdict(knobs(x=field))
    assert line.startswith(f"described: {expected}")


def test_run_check_prints_the_matrix_and_sets_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "TWO_PROCESSES_ON", ())
    monkeypatch.setattr(matrix.families, "families", lambda: ["new_one", "resnet", "vision_transformer"])
    monkeypatch.setattr(methods, "_known", {"good": ConvolutionsOnly})
    assert run_check(["good"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "family              good",
        "new_one             skipped",
        "resnet              passes",
        "vision_transformer  unsupported",
        "unsupported: good on vision_transformer: for CNNs",
        "skipped: new_one: no tiny network of this family is known",
    ]
    monkeypatch.setattr(methods, "_known", {"bad": Crashes})
    assert run_check(["bad"], json_=True) == 1
    states = [row["state"] for row in json.loads(capsys.readouterr().out)]
    assert states == ["skipped", "broken", "broken"]


def test_reason_shared_by_families_is_printed_once() -> None:
    row = matrix.MatrixRow("a", "resnet", "test_resnet", "broken", "trains: crashes", 0.0, [])
    other = matrix.MatrixRow("a", "deit", "deit_tiny", "broken", "trains: crashes", 0.0, [])
    assert matrix.matrix([row, other])[-1] == "broken: a on resnet, deit: trains: crashes"


def test_method_that_fails_to_import_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import EntryPoint

    points = [EntryPoint("lost", "no_such_package:Lost", "harness.methods")]
    monkeypatch.setattr("harness.util.registry.entry_points", lambda group: points)
    monkeypatch.setattr(methods, "_known", {"good": ConvolutionsOnly})
    monkeypatch.setattr(matrix.families, "families", lambda: ["vision_transformer"])
    assert run_check(["good", "lost"]) == 1
    last = capsys.readouterr().out.splitlines()[1]
    assert last.split() == ["vision_transformer", "unsupported", "broken"]


def test_unregistered_method_is_refused() -> None:
    with pytest.raises(UserError, match="method spn: no such method; did you mean spm"):
        run_check(["spn"])
