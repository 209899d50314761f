"""The documentation site builds without a warning, needs no network, and its reference names all there is."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from harness.cli import main
from harness.engine.training import CurvePoint
from harness.method import methods
from harness.models.backbones.attach import AttachPoints
from harness.runs.folder import RunFolder, Status
from harness.spec import Budget
from studies.study import Study
from studies.tune import HeadTune, Tune

ROOT = Path(__file__).parents[2]
PACKAGES = ("mkdocs", "material", "mkdocstrings_handlers")

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)),
    reason='mkdocs is not installed: pip install -c constraints.txt -e ".[docs]"',
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: any warning, such as a link or an anchor that leads nowhere, fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def page(site: Path, name: str) -> str:
    return (site / "reference" / f"{name}.html").read_text(encoding="utf-8")


def named(text: str) -> set[str]:
    """What stands in code style."""
    return set(re.findall(r"<code>([^<]+)</code>", text))


def test_every_method_and_hyperparameter_is_described(site: Path) -> None:
    groups, *sections = re.split(r'<h2 id="(\w+)"', page(site, "methods"))
    assert set(methods.names()) <= named(groups)
    described = dict(zip(sections[::2], sections[1::2], strict=True))
    assert list(described) == methods.names()
    for name, text in described.items():
        assert set(methods.get(name).Hyperparameters.model_fields) <= named(text), name
        assert len(re.findall(r"<p>\w", text)) >= 2, f"{name} has a summary and says what it does"


def test_every_command_and_option_is_described(site: Path) -> None:
    main._add_commands()
    group = typer.main.get_command(main.app)
    sections = re.split(r'<h2 id="([\w-]+)"', page(site, "commands"))[1:]
    described = dict(zip(sections[::2], sections[1::2], strict=True))
    for name, command in group.commands.items():
        flags = {flag for one in command.params if not getattr(one, "hidden", False) for flag in one.opts}
        missing = {flag for flag in flags if flag.startswith("-") and flag not in described[name]}
        assert missing <= {"-h", "--help"}, name


def test_every_field_of_a_budget_and_a_study_is_described(site: Path) -> None:
    assert set(Budget.model_fields) - {"name"} <= named(page(site, "budget"))
    fields = {*Study.model_fields, *Tune.model_fields, *HeadTune.model_fields} - {"source", "flags"}
    assert fields <= named(page(site, "study"))


def test_every_file_of_a_run_is_described(site: Path) -> None:
    folder = RunFolder(Path("runs/0123"))
    paths = [value.name for key, value in vars(folder).items() if key.endswith("_path")]
    fields = [field.name for one in (Status, CurvePoint) for field in dataclasses.fields(one)]
    text = page(site, "run-folder")
    assert [name for name in [*paths, *fields] if name not in text] == []


def test_every_environment_variable_is_described(site: Path) -> None:
    used = r"(?:environ(?:\.get|\.setdefault)?[(\[]|environment_number\(|env=)\s*\"([A-Z][A-Z_0-9]+)\""
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "harness").rglob("*.py"))
    found = {*re.findall(used, code), "HARNESS_PLUGINS"}
    assert "HARNESS_LEASE" in found
    assert found <= named(page(site, "environment"))


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"(https?:[^\"]+)", path.read_text("utf-8")
        )
        assert loaded == [], path


def test_public_names_are_in_the_python_reference(site: Path) -> None:
    text = page(site, "python")
    for name in ("run", "Spec", "RunStore", "Method", "hyperparameter", "Unsupported", "AttachPoints"):
        assert re.search(rf'<h3 id="[\w.]*\.{name}"', text), name
    verbs = [name for name in vars(AttachPoints) if name.startswith(("insert_", "add_"))]
    assert verbs and [name for name in verbs if name not in text] == []
