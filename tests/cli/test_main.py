"""Help, completion, start-up, wrong usage and exit codes of the program as a whole."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import harness
from tests.support.in_process import call, refusal, runs_in
from tests.support.tiny_cell import environment, fresh_python, run_arguments

COMMANDS = (
    "run", "predict", "export", "list", "check", "new-method", "sync", "ui", "doctor", "compare", "search", "report",
)  # fmt: skip
HEAVY = {
    "torch", "timm", "numpy", "pandas", "mlflow", "mmseg", "mmcv", "lightning_fabric", "PIL", "cv2", "optuna",
    "sqlalchemy", "scipy", "matplotlib", "pydantic", "yaml", "rich",
}  # fmt: skip


def test_version_and_help_of_every_command() -> None:
    assert call("--version").out == f"harness {harness.__version__}\n"
    output = call("--help")
    assert output.code == 0
    assert all(f" {command} " in output.out for command in COMMANDS)
    for command in COMMANDS:
        for flag in ("--help", "-h"):
            output = call(command, flag)
            assert (output.code, output.err) == (0, "")
            assert f"Usage: harness {command}" in output.out


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
import time
from harness.cli.main import main
def heavy(*arguments):
    sys.argv = ["harness", *arguments, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    return {HEAVY!r} & sys.modules.keys()
found = heavy()
for command in {COMMANDS!r}:
    found |= heavy(command) - {{"pydantic"}}  # typer reads the flags of a command by it
print(sorted(found))
"""
    assert fresh_python(code).splitlines()[-1] == "[]"


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
    assert fresh_python(code) == "head_lr False\n"


def test_shell_completion() -> None:
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
def test_wrong_usage_is_one_line(arguments: tuple[str, ...]) -> None:
    assert refusal(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--part", "train"), "--part train: 'train' is not one of 'report', 'dev'"),
        (("run", "--seed", "-1"), "--seed -1: input should be greater than or equal to 0"),
        (("list", "method"), "what: 'method' is not one of 'methods', 'backbones', "),
        (("predict",), "Missing argument 'run'."),
        (("rnu",), "rnu: no such command; did you mean run?"),
    ],
)
def test_wrong_usage_names_flag_value_and_problem(arguments: tuple[str, ...], message: str) -> None:
    assert refusal(*arguments).startswith(message)


STOPPED = "stopped; the same command runs it again\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.4])
def test_early_signal_ends_with_one_line(number: signal.Signals, seconds: float) -> None:
    code = "import harness.__main__ as m; print('ready', flush=True); m.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "list", "backbones"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) in ((130, STOPPED), (0, ""))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["harness.cells.resolve.resolve", "harness.engine.run.load_backbone"])
def test_run_stopped_before_its_first_step_says_so(
    number: signal.Signals, moment: str, colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moment, lambda *_: signal.raise_signal(number))
    output = call(*run_arguments(colours, tiny, tmp_path / "runs"))
    assert (output.code, output.out, output.err) == (130, "", STOPPED)
    assert runs_in(tmp_path / "runs") == []


def test_run_stopped_while_it_evaluates_says_that_it_resumes(
    colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.engine.run.confusion_matrices", lambda *_: signal.raise_signal(signal.SIGINT))
    output = call(*run_arguments(colours, tiny, tmp_path / "runs"))
    assert (output.code, output.out) == (130, "")
    assert output.err.endswith("\ninterrupted: stopped; the same command resumes\n")


def test_compare_stopped_while_it_reads_the_study_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.study.load_study", lambda *_: signal.raise_signal(signal.SIGINT))
    output = call("compare", "demo")
    assert (output.code, output.out, output.err) == (130, "", STOPPED)
