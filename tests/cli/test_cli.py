"""The commands as a user meets them: what they print where, what they refuse and how, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import harness
from harness.errors import UserError
from harness.tracking.mirror import Summary
from harness.util.progress import Reporter
from tests.support.in_process import call, refusal, runs_in
from tests.support.tiny_cell import environment, make_budget, run_arguments

COMMANDS = ("run", "predict", "list", "sync", "ui", "doctor")
LISTED = ("methods", "backbones", "datasets", "heads", "budgets", "runs")
HEAVY = {"torch", "timm", "numpy", "pandas", "mlflow", "mmseg", "mmcv", "lightning_fabric", "PIL", "cv2"}


@pytest.fixture(autouse=True)
def _nothing_of_the_developers_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HARNESS_RUNS", "HARNESS_DATA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, colours: Path, tiny: Path) -> list[str | Path]:
    """The command of a run that is done."""
    command = run_arguments(colours, tiny, tmp_path_factory.mktemp("finished"), "--set", "hidden=8")
    assert call(*command).code == 0
    return command


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Before anything runs


def test_version_and_help_of_every_command() -> None:
    assert call("--version").out == f"harness {harness.__version__}\n"
    said = call("--help")
    assert said.code == 0
    assert all(f" {command} " in said.out for command in COMMANDS)
    for command in COMMANDS:
        for flag in ("--help", "-h"):
            said = call(command, flag)
            assert (said.code, said.err) == (0, "")
            assert f"Usage: harness {command}" in said.out


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from harness.cli.main import main
for arguments in ([], *([command] for command in {COMMANDS!r})):
    sys.argv = ["harness", *arguments, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
print(sorted({HEAVY!r} & sys.modules.keys()))
"""
    assert python(code).splitlines()[-1] == "[]"


def test_methods_are_imported_without_torch() -> None:
    code = """
import importlib, pkgutil, sys
import methods
from harness.method import methods as registry
for module in pkgutil.iter_modules(methods.__path__):
    if not module.ispkg:
        importlib.import_module(f"methods.{module.name}")
print(registry.get("spm").Hyperparameters.describe()[0]["name"], "torch" in sys.modules)
"""
    assert python(code) == "lr False\n"


def test_shell_completion_is_printed_and_completes() -> None:
    base = environment(_HARNESS_COMPLETE="complete_bash", COMP_WORDS="harness list me", COMP_CWORD="2")
    program = shutil.which("harness", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run([program], capture_output=True, text=True, env=base, timeout=900)
    assert done.stdout.split() == ["methods"]
    # Which shell is asked for, in place of the one that runs the tests (`make` runs them in sh, which has none).
    named = environment(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    show = [program, "--show-completion", "bash"]
    done = subprocess.run(show, capture_output=True, text=True, env=named, timeout=900)
    assert "_HARNESS_COMPLETE=complete_bash" in done.stdout


# What there is


@pytest.mark.parametrize("what", LISTED)
def test_every_list_is_a_table_and_json(what: str, tmp_path: Path) -> None:
    places = ("--runs", tmp_path / "runs", "--data", tmp_path / "data")
    said = call("list", what, "--json", *places)
    assert (said.code, said.err) == (0, "")
    rows = json.loads(said.out)
    table = call("list", what, *places)
    assert (table.code, table.err) == (0, "")
    if what == "runs":
        assert (rows, table.out) == ([], "none\n")
    else:
        assert rows
        assert all(row["name"] in table.out for row in rows)
    assert not (tmp_path / "runs").exists()


def test_every_hyperparameter_is_listed_with_what_a_user_and_a_search_need() -> None:
    methods = {row["name"]: row for row in json.loads(call("list", "methods", "--json").out)}
    for method in methods.values():
        assert method["summary"]
        assert method["source"]
        for field in method["hyperparameters"]:
            assert field.keys() == {"name", "type", "default", "bounds", "help", "search"}
            assert field["help"]
            assert field["default"] is not None
            if field["type"] in ("number", "integer"):
                assert {"minimum", "exclusiveMinimum"} & field["bounds"].keys()
                assert {"maximum", "exclusiveMaximum"} & field["bounds"].keys()
    (hidden,) = (field for field in methods["spm"]["hyperparameters"] if field["name"] == "hidden")
    assert (hidden["default"], hidden["bounds"]) == (32, {"minimum": 1, "maximum": 1024})
    assert hidden["search"] == [8, 64, "log"]


def test_own_datasets_and_whether_the_others_are_there_are_listed(tmp_path: Path, colours: Path) -> None:
    rows = {row["name"]: row for row in json.loads(call("list", "datasets", "--json", "--data", colours.parent).out)}
    assert (rows["colours"]["kind"], rows["colours"]["there"]) == ("folder", True)
    assert (rows["ade20k"]["kind"], rows["ade20k"]["there"]) == ("mmsegmentation", False)


def test_finished_and_damaged_runs_are_listed_together(finished: list[str | Path], tmp_path: Path) -> None:
    runs = finished[finished.index("--runs") + 1]
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / ("0" * 16)).mkdir()
    said = call("list", "runs", "--runs", tmp_path / "runs")
    assert (said.code, said.err) == (0, "")
    assert "spm(hidden=8)" in said.out
    assert re.search(r"^0{16} .* damaged: .*spec.yaml is missing or damaged$", said.out, re.MULTILINE)


@pytest.mark.usefixtures("offline")
def test_doctor_says_what_is_there_and_what_to_do_about_the_rest(tmp_path: Path) -> None:
    said = call("doctor", "--json", "--runs", tmp_path / "runs", "--data", tmp_path)
    findings = {finding["what"]: finding for finding in json.loads(said.out)}
    assert (said.code, said.err) == (0, "")
    assert findings["package torch"]["state"] == "ok"
    assert findings["dataset ade20k"]["state"] == "absent"
    assert "`harness run --dataset ade20k`" in findings["dataset ade20k"]["remedy"]
    assert findings["weights hub"]["state"] == "absent"
    assert {finding["state"] for finding in findings.values()} <= {"ok", "absent"}
    table = call("doctor", "--runs", tmp_path / "runs", "--data", tmp_path)
    assert table.code == 0
    assert all(what in table.out for what in findings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("offline")
def test_a_broken_plug_in_is_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "no_such_package:Theirs", "harness.methods")
    monkeypatch.setattr("harness.util.registry.entry_points", lambda group: [point])
    said = call("doctor", "--runs", tmp_path, "--data", tmp_path)
    assert said.code == 1
    assert re.search(r"method theirs +broken +.*No module named 'no_such_package'", said.out)
    assert "theirs: broken: --method theirs: no_such_package:Theirs failed to import" in call("list", "methods").out
    assert refusal("run", "--method", "theirs").startswith("--method theirs: no_such_package:Theirs failed to import")


def test_sync_says_how_many_and_which_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = Summary(mirrored=2, current=1, failed={"ab12": "its status.json is damaged"})
    monkeypatch.setattr("harness.tracking.mirror.sync", lambda runs, uri: summary)
    said = call("sync", "--runs", tmp_path)
    assert said.code == 1
    assert said.out == "2 mirrored, 1 up to date, 1 failed\n  ab12: its status.json is damaged\n"
    monkeypatch.setattr("harness.tracking.mirror.sync", lambda runs, uri: Summary())
    assert call("sync", "--runs", tmp_path).code == 0


def test_ui_serves_what_it_is_told_to_and_passes_the_exit_code_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[Any, ...]] = []
    monkeypatch.setattr("harness.tracking.mirror.ui", lambda *arguments: served.append(arguments) or 3)
    assert call("ui", "--runs", tmp_path, "--port", "5001").code == 3
    assert served == [(tmp_path, None, "127.0.0.1", 5001)]


@pytest.mark.parametrize("command", ["ui", "sync"])
def test_without_tracking_there_is_nothing_to_show_or_sync(command: str, tmp_path: Path) -> None:
    assert refusal(command, "--runs", tmp_path, "--tracking", "off").startswith("--tracking off: no store to ")


# A run


def test_stdout_is_the_table_and_then_the_folder_and_stderr_is_plain_lines(
    colours: Path, tiny: Path, tmp_path: Path
) -> None:
    said = call(*run_arguments(colours, tiny, tmp_path / "runs", "--method", "linear"))
    assert said.code == 0
    head, row, path = said.out.splitlines()
    assert head.split()[:6] == ["run", "method", "backbone", "dataset", "head", "budget"]
    assert row.split()[:7] == [Path(path).name, "linear", "resnet10t", "colours", "fpn:16", "tiny", "0"]
    assert row.endswith("done")
    assert (Path(path) / "result.json").is_file()
    assert runs_in(tmp_path / "runs") == [Path(path).name]
    first, *steps, last = said.err.splitlines()
    assert first.startswith("linear on resnet10t (weights random), colours: 8 images to train on, ")
    figures = r"step \d+/12  loss \d\.\d{3}  lr \d\.\de-\d\d  train mIoU 0\.\d{3}  [\d.]+ img/s  \d+ s left"
    assert all(re.fullmatch(figures, line) or line.startswith("evaluate ") for line in steps)
    assert re.fullmatch(r"evaluate (\d+)/\1", last)
    assert "\x1b" not in said.err


def test_a_finished_run_is_printed_again_and_nothing_is_trained(finished: list[str | Path]) -> None:
    before, after = call(*finished), call(*finished)
    assert (after.code, after.err) == (0, "")
    assert after.out == before.out
    assert "spm(hidden=8)" in after.out


def test_a_finished_run_is_printed_without_importing_torch(finished: list[str | Path]) -> None:
    code = f"""
import sys
from harness.cli.main import main
sys.argv = ["harness", *{[str(word) for word in finished]!r}]
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    assert python(code).splitlines()[-1] == "False"


def test_on_a_terminal_there_is_a_bar(colours: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    budget = make_budget(tmp_path / "longer.yaml", steps=40)
    command = run_arguments(colours, budget, tmp_path / "runs", "--method", "linear")
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=inner,
        text=True,
        env={name: value for name, value in environment(TERM="xterm").items() if name != "NO_COLOR"},
    )
    os.close(inner)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert process.stdout is not None
    out = process.stdout.read()
    assert process.wait() == 0
    assert len(out.splitlines()) == 3
    assert Path(out.splitlines()[-1]).is_dir()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    bar = (
        r"train [━╸╺ ]+\d+/40 loss \d\.\d{3}  lr \d\.\de-\d\d  train mIoU (-|0\.\d{3})  [\d.]+ img/s (-|\d):(--|\d\d):"
    )
    assert re.search(bar, text)
    assert not re.search(r"^step ", text, re.MULTILINE)


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_prints_plain_lines_on_a_terminal_too(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    reporter = Reporter(quiet)
    reporter.start("train", 2)
    for step in (1, 2):
        reporter.step(step, loss=1.5, lr=1e-3, images_per_second=4)
        reporter.point(step, loss=1.5, lr=1e-3, miou=0.25, images_per_second=4)
    reporter.stop()
    last = "step 2/2  loss 1.500  lr 1.0e-03  train mIoU 0.250  4.0 img/s  0 s left\n"
    assert capsys.readouterr().err.endswith(last) is quiet


def test_the_places_can_be_named_in_the_environment(
    colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_RUNS", str(tmp_path / "there"))
    monkeypatch.setenv("HARNESS_DATA", str(colours.parent))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")
    cell = [
        "--method",
        "linear",
        "--backbone",
        "resnet10t",
        "--weights",
        "random",
        "--head",
        "fpn:16",
        "--workers",
        "0",
    ]
    said = call("run", *cell, "--dataset", "colours", "--budget", tiny)
    assert said.code == 0, said.err
    assert Path(said.out.splitlines()[-1]).parent == tmp_path / "there"


# What is refused


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "method": (("--method", "spn"), r"--method spn: no such method; did you mean spm\?$"),
    "backbone": (("--backbone", "resnet110"), r"--backbone resnet110: unknown; did you mean .*resnet101"),
    "backbone of no family": (
        ("--backbone", "densenet121"),
        r"--backbone densenet121: .* its family cannot be cut into stages here; .*\(families: ",
    ),
    "tag": (("--backbone", "resnet50.a1_in2k"), r"no such pre-training tag; did you mean .*resnet50.a1_in1k"),
    "head": (("--head", "upper"), r"--head upper: no such head; did you mean uper\?$"),
    "head's width": (("--head", "fpn:wide"), r"--head fpn:wide: invalid width 'wide'; give the channels"),
    "head's zero width": (("--head", "fpn:0"), r"--head fpn:0: invalid width '0'"),
    "head's huge width": (("--head", "fpn:8193"), r"--head fpn:8193: invalid width '8193'"),
    "width of a head that has none": (("--head", "linear:8"), r"--head linear:8: takes no width"),
    "head of a ViT on a CNN": (("--head", "setr_pup"), r"--head setr_pup: is for a ViT .* use fpn or uper$"),
    "dataset": (("--dataset", "landcove"), r"--dataset landcove: no such dataset; did you mean landcover\?"),
    "dataset that is not there": (("--dataset", "ade20k"), r"--dataset ade20k: not found under .*; set --data or HARN"),
    "dataset's file": (("--dataset", "none.yaml"), r"--dataset none.yaml: no such file: none.yaml$"),
    "dataset's folder": (("--dataset", "no/where"), r"--dataset no/where: no such file: no/where/dataset.yaml$"),
    "budget": (("--budget", "dem"), r"--budget dem: no such budget; did you mean demo\? \(or name a .yaml file\)$"),
    "budget's file": (("--budget", "none.yaml"), r"--budget none.yaml: No such file"),
    "no such hyperparameter": (
        ("--set", "hiden=3"),
        r"--set hiden: no such hyperparameter of method spm; did you mean hid",
    ),
    "hyperparameter out of range": (("--set", "hidden=0"), r"hidden=0: input should be greater than or equal to 1$"),
    "hyperparameter of the wrong type": (("--set", "hidden=3.5"), r"hidden=3.5: input should be a valid integer"),
    "hyperparameter that is no flag": (("--set", "guidance=perhaps"), r"guidance=perhaps: input should be a valid"),
    "hyperparameter that is no number": (("--set", "lr=nan"), r"lr=nan: input should be "),
    "hyperparameter without a value": (("--set", "lr="), r"lr='': input should be a valid number"),
    "hyperparameter twice": (("--set", "lr=1", "--set", "lr=2"), r"--set lr=2: lr is set twice$"),
    "no key and value": (("--set", "lr"), r"--set lr: expected KEY=VALUE$"),
    "no key": (("--set", "=3"), r"--set =3: expected KEY=VALUE$"),
    "device": (("--device", "tpu"), r"--device tpu: give auto, cpu, cuda or cuda:N$"),
    "device with a number that has none": (("--device", "cpu:1"), r"--device cpu:1: give auto, cpu, cuda or cuda:N$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_exist_or_fit_is_one_line_and_leaves_nothing(
    case: str, colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, complaint = REFUSED[case]
    line = refusal(*run_arguments(colours, tiny, tmp_path / "runs", *arguments))
    assert re.search(complaint, line), line
    assert runs_in(tmp_path / "runs") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(device: str, colours: Path, tiny: Path, tmp_path: Path) -> None:
    line = refusal(*run_arguments(colours, tiny, tmp_path / "runs", "--device", device))
    assert line.startswith(f"--device {device}: torch sees no CUDA device here; give cpu")
    assert runs_in(tmp_path / "runs") == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated image": (lambda d: truncate(d / "images/train/3.png"), r"images/train/3.png: image file is truncated$"),
    "label out of range": (
        lambda d: Image.fromarray(np.full((64, 64), 7, np.uint8)).save(d / "masks/test/1.png"),
        r"masks/test/1.png: label 7 at \(0, 0\) but 3 classes \(0\.\.2\) and 255 = ignore$",
    ),
    "mask missing": (lambda d: (d / "masks/train/2.png").unlink(), r"images/train/2.png: no mask .*masks/train/2.png"),
    "no description": (lambda d: (d / "dataset.yaml").unlink(), r"holds no dataset.yaml; write one that names the"),
    "one class": (lambda d: (d / "dataset.yaml").write_text("classes: [all]"), r"dataset.yaml: classes: \['all'\]"),
    "no test part": (lambda d: shutil.rmtree(d / "images/test"), r"images/val: no such folder; `splits` and `root`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_dataset_that_is_broken_is_one_line_that_names_the_file(
    case: str, colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, complaint = BROKEN[case]
    shutil.copytree(colours, tmp_path / "broken")
    change(tmp_path / "broken")
    monkeypatch.chdir(tmp_path)
    line = refusal(*run_arguments(Path("broken"), tiny, tmp_path / "runs"))
    assert line.startswith("--dataset broken")
    assert re.search(complaint, line), line
    assert runs_in(tmp_path / "runs") == []


@pytest.mark.parametrize(("head", "crop"), [("fpn:16", 32), ("uper:16", 64)])
def test_a_budget_under_which_the_head_cannot_be_trained_is_refused_before_it_begins(
    head: str, crop: int, colours: Path, tmp_path: Path
) -> None:
    budget = make_budget(tmp_path / "narrow.yaml", batch_size=2, accumulate=2, crop=[crop, crop])
    line = refusal(*run_arguments(colours, budget, tmp_path / "runs", "--head", head))
    assert line.startswith(f"--budget narrow: the batch norms of head {head} see one value a channel")
    assert runs_in(tmp_path / "runs") == []


def test_a_place_for_runs_that_cannot_be_is_refused(colours: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refusal(*run_arguments(colours, tiny, tmp_path / "file"))
    assert line == f"--runs {tmp_path / 'file'}: cannot be written: Not a directory; choose another folder"


def test_a_method_that_does_not_go_with_the_backbone_is_a_row_with_its_reason(
    colours: Path, tiny: Path, tmp_path: Path
) -> None:
    said = call(*run_arguments(colours, tiny, tmp_path / "runs", "--set", "gaps=9"))
    assert (said.code, said.out) == (1, "")
    assert said.err.endswith("gap 9 does not exist: there are 3 gaps between 4 stages\n")
    assert "unsupported: spm on resnet10t: gap 9" in call("list", "runs", "--runs", tmp_path / "runs").out


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--seed", "-1"),
        ("run", "--seed", "2147483648"),
        ("run", "--seed", "one"),
        ("run", "--workers", "-1"),
        ("run", "--part", "train"),
        ("run", "--learning-rate", "1"),
        ("run", "spm"),
        ("list", "method"),
        ("list",),
        ("ui", "--port", "65536"),
        ("predict", "abc"),
        ("train",),
    ],
    ids=" ".join,
)
def test_what_is_no_command_line_is_answered_with_the_usage(arguments: tuple[str, ...], tmp_path: Path) -> None:
    said = call(*arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("Usage: harness")
    assert "Error" in said.err
    assert "Traceback" not in said.err


def test_again_keeps_the_old_result_where_the_new_run_cannot_begin(
    colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = run_arguments(colours, tiny, tmp_path / "runs", "--method", "linear")
    folder = Path(call(*arguments).out.splitlines()[-1])
    before = (folder / "result.json").read_bytes()

    def out_of_reach(*_: object) -> None:
        raise UserError("--weights auto: the hub does not give them any more")

    with monkeypatch.context() as patch:
        patch.setattr("harness.engine.run.load_backbone", out_of_reach)
        assert refusal(*arguments, "--again").startswith("--weights auto")
    assert (folder / "result.json").read_bytes() == before
    assert not (tmp_path / "runs" / ".superseded").exists()
