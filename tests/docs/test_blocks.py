"""What the documentation shows as input is accepted: studies, budgets, datasets, command lines, code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from harness.cli import main
from harness.contract.checks import described
from harness.data.description import read_description
from harness.method import Method
from harness.spec import budget_from
from studies import shipped_studies
from studies.study import load_study

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[object]:
    """The code blocks in this language, each with the place where it is."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(rf"^```{language}\b[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, block.start()) + 1
            found.append(pytest.param(block[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_read_as_what_it_is(text: str, tmp_path: Path) -> None:
    file, fields = tmp_path / "file.yaml", yaml.safe_load(text)
    file.write_text(text, encoding="utf-8")
    if "methods" in fields:
        load_study(file).check(tmp_path, tmp_path)
    elif "classes" in fields:
        assert len(read_description(file).classes) > 1
    else:
        assert budget_from(fields, "file").steps > 0


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles(text: str) -> None:
    compile(text, "block", "exec")


def test_the_method_of_the_guide_is_well_described() -> None:
    (text,) = (
        one.values[0] for one in blocks("python") if "guides/own-method" in one.id and "class Gain" in one.values[0]
    )
    names: dict[str, object] = {"__name__": "a_guide"}
    exec(text, names)
    method = names["ChannelGain"]
    assert isinstance(method, type) and issubclass(method, Method)
    described(method)


def command_lines() -> list[object]:
    found = []
    for page in PAGES:
        for block in re.finditer(r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            lines = [line.removeprefix("$ ") for line in block[1].replace("\\\n", " ").splitlines()]
            found += [
                pytest.param(line, id=f"{page.name}: {line[:60]}") for line in lines if line.startswith("harness ")
            ]
    return found


@pytest.mark.parametrize("line", command_lines())
def test_command_and_flags_exist(line: str) -> None:
    main._add_commands()
    commands = typer.main.get_command(main.app).commands
    name, *arguments = shlex.split(re.sub(r"[\[\]|]|&&.*", " ", line), comments=True)[1:]
    names = name.split()
    if "list methods" in line and len(names) > 1:
        names = names[:1]
    known = {flag for one in commands[names[0]].params for flag in one.opts}
    assert {argument.partition("=")[0] for argument in arguments if argument.startswith("-")} <= known


def test_study_of_the_guide_is_the_one_that_ships() -> None:
    (shown, *_) = (one.values[0] for one in blocks("yaml") if "guides/compare.md" in str(one.id))
    assert yaml.safe_load(str(shown)) == yaml.safe_load(shipped_studies()["landcover"].read_text(encoding="utf-8"))
