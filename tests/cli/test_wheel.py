"""The wheel holds all that a run needs: in an environment of its own, outside the checkout, it runs a cell."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from studies.study import load_study
from tests.support import step_costs
from tests.support.tiny_cell import environment, run_arguments

CHECKOUT = Path(__file__).parents[2]
PACKAGES = ("harness", "methods", "studies", "reports")

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr + done.stdout:
        pytest.skip("building a wheel takes setuptools from a package index, and none answers")
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment that holds the wheel, and this one's packages without an editable install."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # Found after the wheel; a `.pth` file does not read the `.pth` files of the folders that it names.
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "others.pth").write_text("\n".join(others))
    return folder / "bin" / "python"


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    wanted = {
        str(path.relative_to(CHECKOUT))
        for name in PACKAGES
        for path in (CHECKOUT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_cell_runs_from_the_wheel(python: Path, colours: Path, tiny: Path, tmp_path: Path) -> None:
    def printed(*arguments: str | Path) -> str:
        command = [str(python), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import harness, methods; print(harness.__file__, methods.__file__)"
    where = printed("-c", code)
    assert str(CHECKOUT) not in where and where.count("site-packages") == 2
    step_costs.lend(tmp_path / "runs")
    assert "done" in printed("-m", "harness", *run_arguments(colours, tiny, tmp_path / "runs"))
    code = (
        "import reports.report, studies.compare; from studies.study import load_study; print(load_study('demo').title)"
    )
    assert printed("-c", code) == f"{load_study('demo').title}\n"
