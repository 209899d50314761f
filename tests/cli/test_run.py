"""`harness run`: what it prints, a finished run, a rerun, progress."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.util.progress import Reporter
from tests.support.in_process import call, refusal, runs_in, train
from tests.support.tiny_cell import fresh_python, make_budget, run_arguments
from tests.support.warm_start import Starter


def test_run_prints_results_to_stdout_and_progress_to_stderr(colours: Path, tiny: Path, tmp_path: Path) -> None:
    output = call(*run_arguments(colours, tiny, tmp_path / "runs", "--method", "linear"))
    assert output.code == 0
    head, row, path = output.out.splitlines()
    assert head.split()[:6] == ["run", "method", "backbone", "dataset", "head", "budget"]
    assert row.split()[:7] == [Path(path).name, "linear", "test_resnet", "colours", "fpn:16", "tiny", "0"]
    assert row.endswith("done")
    assert (Path(path) / "result.json").is_file()
    assert runs_in(tmp_path / "runs") == [Path(path).name]
    first, normalisation, *steps, last = output.err.splitlines()
    assert normalisation.startswith("images are normalised with mean ")
    assert first.startswith(
        "linear on test_resnet (weights random), colours: training on 8 images, evaluating on 5 (test); "
    )
    figures = r"step \d+/12  loss \d\.\d{3}  lr \d\.\de-\d\d  train mIoU 0\.\d{3}  [\d.]+ img/s  \d+ s left"
    assert all(re.fullmatch(figures, line) or line.startswith("evaluate ") for line in steps)
    assert re.fullmatch(r"evaluate (\d+)/\1", last)
    assert "\x1b" not in output.err


def test_run_warns_of_shared_groups_and_small_crops_on_stderr_and_in_its_log(colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "shared")
    with (tmp_path / "shared" / "dataset.yaml").open("a") as description:
        description.write("group: (.)")  # train and test have both images of 0 to 4
    budget = make_budget(tmp_path / "small.yaml", steps=1, warmup=0, crop=[32, 24])
    command = run_arguments(tmp_path / "shared", budget, tmp_path / "runs", "--method", "linear")
    output = call(*command)
    assert output.code == 0
    printed = [line.removeprefix("warning: ") for line in output.err.splitlines() if line.startswith("warning: ")]
    assert [line.partition(" (")[0] for line in printed] == [
        "shared: train and test share 5 groups",
        "shared: the crop [32, 24] covers 38 % of the images' width, 24 of 64 pixels, at working size; use one closer "
        "to [64, 64], or a smaller `scale`",
    ]
    log = Path(output.out.splitlines()[-1], "log.txt").read_text()
    assert all(f"warning: {line}" in log for line in printed)


def test_run_on_the_dev_part_says_where_it_comes_from(colours: Path, tmp_path: Path) -> None:
    budget = make_budget(tmp_path / "b.yaml", steps=1, warmup=0)
    shutil.copytree(colours, tmp_path / "three")
    for kind in ("images", "masks"):
        shutil.copytree(colours / kind / "test", tmp_path / "three" / kind / "val")
    for dataset, expected in (
        (colours, "training on 6 images, evaluating on 2 (dev, held out of train by group)"),
        (tmp_path / "three", "training on 8 images, evaluating on 5 (dev)"),
    ):
        output = call(*run_arguments(dataset, budget, tmp_path / "runs", "--method", "linear", "--part", "dev"))
        assert output.code == 0 and expected in output.err


def test_run_on_a_test_split_that_is_held_out_says_so(colours: Path, tmp_path: Path) -> None:
    description = tmp_path / "held.yaml"
    description.write_text((colours / "dataset.yaml").read_text() + f"root: {colours}\nsplits: {{test: 0.25}}\n")
    budget = make_budget(tmp_path / "b.yaml", steps=1, warmup=0)
    output = call(*run_arguments(description, budget, tmp_path / "runs", "--method", "linear"))
    assert "training on 6 images, evaluating on 2 (test, held out of train by group)" in output.err


def test_finished_run_is_printed_and_not_trained(finished: list[str | Path]) -> None:
    before, after = call(*finished), call(*finished)
    assert (after.code, after.err) == (0, "")
    assert after.out == before.out
    assert "spm(hidden=8)" in after.out


@pytest.mark.parametrize("name", ["confusions.npz", "delta.safetensors"])
def test_run_with_a_changed_file_is_executed_again(name: str, colours: Path, tiny: Path, tmp_path: Path) -> None:
    arguments = run_arguments(colours, tiny, tmp_path / "runs", "--method", "linear")
    folder = train(colours, tiny, tmp_path / "runs", "--method", "linear")
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    output = call(*arguments)
    changed = f"warning: {folder / name} was changed or removed after the run ended; the run is executed again"
    assert output.code == 0 and changed in output.err.splitlines()
    assert changed not in call(*arguments).err


def test_finished_run_is_printed_without_torch(finished: list[str | Path]) -> None:
    code = f"""
import sys
from harness.cli.main import main
sys.argv = ["harness", *{[str(word) for word in finished]!r}]
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    assert fresh_python(code).splitlines()[-1] == "False"


@pytest.mark.parametrize("flag", ["--force", "--again"])
def test_force_keeps_the_old_result_if_the_rerun_cannot_start(
    flag: str, colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = run_arguments(colours, tiny, tmp_path / "runs", "--method", "linear")
    folder = train(colours, tiny, tmp_path / "runs", "--method", "linear")
    before = (folder / "result.json").read_bytes()

    def out_of_reach(*_: object) -> None:
        raise UserError("--weights auto: the hub does not give them any more")

    with monkeypatch.context() as patch:
        patch.setattr("harness.engine.run.load_backbone", out_of_reach)
        assert refusal(*arguments, flag).startswith("--weights auto")
    assert (folder / "result.json").read_bytes() == before
    assert not (tmp_path / "runs" / ".superseded").exists()


def test_unsupported_method_is_listed_with_the_reason(colours: Path, tiny: Path, tmp_path: Path) -> None:
    output = call(*run_arguments(colours, tiny, tmp_path / "runs", "--set", "gaps=9"))
    assert (output.code, output.out) == (1, "")
    assert output.err.endswith("gap 9 does not exist: there are 3 gaps between 4 stages\n")
    assert "unsupported: spm on test_resnet: gap 9" in call("list", "runs", "--runs", tmp_path / "runs").out


def test_progress_bar_on_a_terminal(start: Starter, colours: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    budget = make_budget(tmp_path / "longer.yaml", steps=40)
    command = run_arguments(colours, budget, tmp_path / "runs", "--method", "linear")
    terminal, inner = pty.openpty()
    process = start(*command, terminal=inner, TERM="xterm", NO_COLOR="")
    os.close(inner)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert process.wait() == 0
    out = process.stdout
    assert len(out.splitlines()) == 3
    assert Path(out.splitlines()[-1]).is_dir()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    bar = (
        r"train [━╸╺ ]+\d+/40 loss \d\.\d{3}  lr \d\.\de-\d\d  train mIoU (-|0\.\d{3})  [\d.]+ img/s (-|\d):(--|\d\d):"
    )
    assert re.search(bar, text)
    assert not re.search(r"^step ", text, re.MULTILINE)


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_prints_plain_lines_on_a_terminal(
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


def test_folders_from_environment_variables(
    colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_RUNS", str(tmp_path / "there"))
    monkeypatch.setenv("HARNESS_DATA", str(colours.parent))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")
    cell = [
        "--method",
        "linear",
        "--backbone",
        "test_resnet",
        "--weights",
        "random",
        "--head",
        "fpn:16",
        "--workers",
        "0",
    ]
    output = call("run", *cell, "--dataset", "colours", "--budget", tiny)
    assert output.code == 0, output.err
    assert Path(output.out.splitlines()[-1]).parent == tmp_path / "there"
