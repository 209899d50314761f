"""Flags made from dataclass fields: one definition for all commands, and how their values are read."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest

from harness.cells.request import Request
from harness.cli.main import app
from harness.cli.options import with_options
from harness.engine.options import ExecutionOptions
from harness.spec import Part
from harness.util.option import read_size
from tests.support.in_process import call, refusal


def flag_of(field: dataclasses.Field[Any]) -> str:
    return (field.metadata.get("flags") or (f"--{field.name.replace('_', '-')}",))[0]


def flags_of(command: str) -> dict[str, str]:
    """Flag -> its entry in the help."""
    text = call(command, "--help").out
    found = re.findall(r"^  (?:-\w, )?(--[\w-]+)(.*(?:\n {6,}.*)*)", text, re.MULTILINE)
    return {flag: " ".join(rest.split()) for flag, rest in found}


def test_commands_share_each_flag_with_its_help_text() -> None:
    run, compare, search = (flags_of(command) for command in ("run", "compare", "search"))
    shared = {flag_of(field) for field in dataclasses.fields(ExecutionOptions)}
    visible = {flag for flag in shared if flag in compare}
    assert visible >= {"--runs", "--data", "--device", "--workers", "--tracking", "--cache-size", "--plugin"}
    assert {flag: compare[flag] for flag in visible} == {flag: search[flag] for flag in visible}
    assert all(run[flag] == compare[flag] for flag in visible if flag in run)
    launcher = {"--launcher", "--jobs", "--launcher-set"}
    assert {flag: compare[flag] for flag in launcher} == {flag: search[flag] for flag in launcher}
    cell = {flag_of(field) for field in dataclasses.fields(Request)} - {"--part"}
    assert {flag: run[flag] for flag in cell} == {flag: search[flag] for flag in cell}


def test_parts_are_those_of_a_spec() -> None:
    (field,) = (field for field in dataclasses.fields(Request) if field.name == "part")
    assert get_args(field.metadata["type"]) == get_args(Part)


def test_every_help_text_has_an_example() -> None:
    call("--help")  # adds the commands of other packages
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert f"Example:\n  harness {name} " in call(name, "--help").out


def test_every_shipped_study_is_in_the_help() -> None:
    from studies import shipped_studies

    text = call("compare", "--help").out
    assert all(name in text for name in shipped_studies())


def test_objects_are_made_of_the_flags(tmp_path: Path) -> None:
    seen = []

    @with_options()
    def command(options: ExecutionOptions, extra: Annotated[int, "untouched"] = 3) -> None:
        seen.append((options, extra))

    names = list(inspect.signature(command).parameters)
    assert "options_runs" in names and "options_cores" not in names and names[-1] == "extra"
    values = dict.fromkeys((name for name in names if name.startswith("options_")), None)
    command(**{**values, "options_cache_size": "1KiB", "options_runs": tmp_path}, extra=4)
    assert seen == [(ExecutionOptions(cache_size=1024, runs=tmp_path), 4)]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("123", 123), ("8GB", 8 * 10**9), ("8 GiB", 8 * 2**30), (" 1.5mib ", 3 * 2**19), ("2TB", 2 * 10**12)],
)
def test_size_is_a_number_and_a_unit(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-1GB", "1e9", "8 GB GB", "1,5GB", "all"])
def test_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid size; give a number and a unit, such as 8GB or 500MiB, or 0"):
        read_size(text)


def test_default_cache_size_is_the_one_in_the_help() -> None:
    (field,) = (field for field in dataclasses.fields(ExecutionOptions) if field.name == "cache_size")
    assert read_size(field.metadata["shown_default"]) == field.default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--time-limit", "0"), "--time-limit 0: use a number above 0"),
        (("--time-limit", "nan"), "--time-limit nan: use a finite number"),
        (("--checkpoint-seconds", "inf"), "--checkpoint-seconds inf: use a finite number"),
        (("--cache-size", "8 gigs"), "--cache-size 8 gigs: invalid size; give a number and a unit, such as 8GB"),
        (("--time-limit", "inf"), "--time-limit inf: use a finite number"),
        (("--cache-size", "1e400"), "--cache-size 1e400: invalid size"),
        (("--cache-size", "9" * 5000 + "TB"), f"--cache-size {'9' * 120}... (5002 characters): invalid size"),
        (("--runs", " "), "--runs: it is empty; name a file or folder"),
        (("--device", "tpu"), "--device tpu: use auto, cpu, cuda or cuda:N"),
        (
            ("--tracking", "foo://me:secret@host?token=x"),
            "--tracking foo://host: MLflow has no such kind of store; use",
        ),
        (("--trials", "9" * 30), "--trials 9"),
        (("--seeds", "1000000000"), "--seeds 1000000000: input should be less than or equal to 10000"),
        (("--launcher-set", "address"), "--launcher-set address: expected KEY=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_option_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    for command in (("compare", "demo"), ("search",)):
        assert refusal(*command, *arguments).startswith(message)


@pytest.mark.parametrize("name", ["RANK", "OMP_NUM_THREADS"])
def test_variable_that_is_no_number_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(name, "many")
    for command in (("run",), ("compare", "demo", "--plan")):
        line = refusal(*command, "--runs", tmp_path)
        assert line == f"{name}=many: not a whole number; set it to one, or unset it"
