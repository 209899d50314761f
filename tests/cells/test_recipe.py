"""`harness run --from`: a file replaces the flags, flags take precedence, and a run's own spec repeats the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from harness.cells.recipe import read_recipe, write_recipe
from harness.cells.resolve import Request, resolve
from harness.runs.folder import RunFolder
from harness.runs.store import RunStore
from harness.spec import budget
from tests.support.in_process import call, refusal
from tests.support.run_commands import only_run
from tests.support.tiny_cell import make_dataset


@pytest.fixture(scope="module")
def done(whole: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of the tiny cell. Not to be changed."""
    return only_run(Path(shutil.copytree(whole.path.parent, tmp_path_factory.mktemp("runs"), dirs_exist_ok=True)))


def test_recipe_round_trips_a_request(tmp_path: Path) -> None:
    request = Request(
        "lora", "resnet10t", "random", "camvid", "fpn:16", budget("small"), 3, "dev", {"rank": 4, "lr": 1e-4}
    )
    path = tmp_path / "cell.yaml"
    path.write_text(write_recipe(request, "why it is\nwhat it is"))
    assert path.read_text().startswith("# why it is\n# what it is\nmethod: lora\n")
    assert read_recipe(path, {}) == request


def test_flags_take_precedence_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cell.yaml"
    path.write_text("method: spm\nseed: 4\nbudget: {base: demo, steps: 9, warmup: 0}\nsettings: {hidden: 8, lr: 0.1}\n")
    request = read_recipe(path, {"seed": 5, "settings": {"lr": "0.2"}})
    assert (request.method, request.seed, request.settings) == ("spm", 5, {"hidden": 8, "lr": "0.2"})
    assert not isinstance(request.budget, str) and (request.budget.name, request.budget.steps) == ("cell", 9)
    assert request.backbone == Request().backbone


def test_spec_of_a_run_resolves_to_the_same_run(done: RunFolder, colours: Path) -> None:
    runs = done.path.parent
    said = call("run", "--from", done.path / "spec.yaml", "--dataset", colours, "--runs", runs)
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[-1] == str(done.path)
    other = call("run", "--from", done.path / "spec.yaml", "--dataset", colours, "--set", "hidden=x", "--runs", runs)
    assert other.code == 2 and "hidden=x: " in other.err


def test_spec_that_resolves_to_another_run_is_a_warning(done: RunFolder, tmp_path: Path, tiny: Path) -> None:
    changed = make_dataset(tmp_path / "colours", ignored_rows=0)
    spec = done.spec()
    other = resolve(
        Request("spm", "test_resnet", "random", str(changed), "fpn:16", str(tiny)), RunStore(tmp_path), tmp_path
    ).spec.fingerprint
    said = call("run", "--from", done.path / "spec.yaml", "--dataset", changed, "--runs", tmp_path, "--tracking", "off")
    assert said.code == 0
    warning = f"resolved to run {other}, not {spec.fingerprint}: data_digest differ"
    assert said.err.startswith(f"warning: {done.path / 'spec.yaml'}: {warning}\n")


def test_weights_from_a_file_must_be_passed_again(done: RunFolder, tmp_path: Path) -> None:
    fields = yaml.safe_load((done.path / "spec.yaml").read_text())
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**fields, "weights": "sha256:" + "5" * 64}))
    assert refusal("run", "--from", path) == (
        f"{path}: weights: sha256:555555555555... is the hash of a file; pass the file with --weights"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methd: spm", "methd: no such field; did you mean method?"),
        ("- spm", "expected the fields of a cell, such as `method: spm`"),
        ("a: [", "not YAML: "),
        ("seed: one", "seed: one: expected a number"),
        ("seed: -1", "seed: -1: use a number from 0 to 2147483647"),
        ("seed: true", "seed: True: use a number from 0 to 2147483647"),
        ("seed: 2147483648", "seed: 2147483648: use a number from 0 to 2147483647"),
        ("settings: {1: 2}", "settings: {1: 2}: expected hyperparameters"),
        ("method: spm\nmethod: lora", "line 2: method appears twice"),
        ("method: spm\nsettings: {hidden: true}", "settings.hidden: True: expected a number"),
        ("method: 3", "method: 3: expected a name"),
        ("part: test", "part: test: use report or dev"),
        ("settings: [lr]", "settings: ['lr']: expected hyperparameters, such as `lr: 0.001`"),
        ("budget: {steps: 0}", "budget.steps: 0: "),
        ("method: spm\nhyperparameters: {}", "not the complete spec of a run"),
    ],
)
def test_invalid_file_is_a_one_line_error(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "cell.yaml"
    path.write_text(text)
    assert refusal("run", "--from", path).startswith(f"{path}: {said}")


def test_missing_file_is_a_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert refusal("run", "--from", path) == f"--from {path}: No such file or directory"
