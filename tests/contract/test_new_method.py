"""`harness new-method`: the generated package, and names that it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.contract.new_method import new_method
from harness.errors import UserError
from tests.support.tiny_cell import environment


def test_invalid_or_taken_name_and_existing_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "my-method").mkdir()
    for name, reason in {
        "My-Method": "invalid name; use lower_case_with_underscores",
        "class": "invalid name",
        "2nd": "invalid name",
        "spm": "the method name is taken",
        "torch": "a Python module of that name is installed",
        "my_method": r".*my-method exists; remove it",
    }.items():
        with pytest.raises(UserError, match=f"new-method {name}: {reason}"):
            new_method(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["my-method"]


@pytest.mark.exhaustive
def test_generated_package_installs_and_passes_its_own_tests(tmp_path: Path) -> None:
    package = new_method("stage_residual", tmp_path)
    assert package == tmp_path / "stage-residual"
    # What `pip install -e` leaves to be found, without the `wheel` package that pip would need for it.
    call("-c", "import setuptools; setuptools.setup()", "-q", "egg_info", cwd=package)
    there = environment(PYTHONPATH=str(package / "src"))
    code = (
        "from harness.method import methods; from harness.cells.plugins import method_origin; "
        "print(method_origin(methods.get('stage_residual')))"
    )
    origin = call("-c", code, env=there)
    assert "'package': 'stage-residual', 'version': '0.1.0', 'sha256':" in origin
    assert "2 passed" in call("-m", "pytest", "tests", "-q", "-k", "resnet or vision", cwd=package, env=there)
    ruff = [sys.executable, "-m", "ruff", "check", "--line-length", "120", "--select", "E,F,I,B,UP,SIM", str(package)]
    assert subprocess.run(ruff, capture_output=True, cwd=package).returncode == 0


def call(*arguments: str | Path, **options: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
