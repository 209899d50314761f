"""Plugins: a single file, a generated package, and the errors for invalid ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.cells import plugins
from harness.errors import UserError
from harness.method import methods
from harness.util.files import sha256
from tests.support.short_plugin import SCALE
from tests.support.tiny_cell import environment


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves a plugin, its module or its variable behind."""
    monkeypatch.setattr(methods, "_known", dict(methods._known))
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setenv(plugins.VARIABLE, "")
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("harness_plugin_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def scale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "scale.py"
    path.write_text(SCALE, encoding="utf-8")
    return path


def refusal(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    before = methods.names(), sorted(sys.modules)
    with pytest.raises(UserError) as caught:
        plugins.load([path])
    assert (methods.names(), sorted(sys.modules)) == before
    (line,) = str(caught.value).splitlines()
    return line.removeprefix(f"--plugin {path}: ")


def test_plugin_is_loaded_once_and_in_child_processes(scale: Path) -> None:
    plugins.load([scale])
    plugins.load([scale])
    assert os.environ[plugins.VARIABLE] == str(scale)
    code = (
        "from harness.cells import plugins; from harness.method import methods; plugins.load(); print(methods.names())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(HARNESS_PLUGINS=str(scale))
    )
    assert "'channel_scale'" in done.stdout, done.stderr


def test_imports_helpers_and_abstract_classes_are_not_methods(tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text(
        SCALE.replace("class Scale(Method)", "class Base(Method):\n    pass\n\n\nclass _Helper(Method):\n    pass\n\n\n"
                      "class Scale(Base)") + "\n\nclass Other(Scale):\n    name = 'other_scale'\n",
        encoding="utf-8",
    )  # fmt: skip
    before = set(methods.names())
    plugins.load([path])
    assert set(methods.names()) - before == {"channel_scale", "other_scale"}


def test_invalid_plugin_is_named_and_registers_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    assert refusal(path, "import no_such_module") == (
        "failed to import: ModuleNotFoundError: No module named 'no_such_module'"
    )
    assert refusal(path, "def (").startswith("failed to import: SyntaxError")
    assert refusal(path, "import sys\nsys.exit(3)") == "failed to import: SystemExit: 3"
    assert refusal(path, "from harness.method import Method").startswith("defines no method")
    assert refusal(path, SCALE.replace("channel_scale", "spm")) == (
        "Scale: the method name spm is taken; choose another"
    )
    assert refusal(path, SCALE.replace('"channel_scale"', '"Channel Scale"')).startswith("Scale: invalid name 'Channel")
    assert refusal(path, SCALE.replace('    name = "channel_scale"\n', "")).startswith("Scale: invalid name None")
    twice = SCALE + "\n\nclass Same(Scale):\n    pass\n"
    assert refusal(path, twice) == "Same: the method name channel_scale is taken; choose another"
    with pytest.raises(UserError, match=r"--plugin .*gone\.py: no such file"):
        plugins.load([tmp_path / "gone.py"])


def test_error_names_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "gone.py"))
    with pytest.raises(UserError, match=r"HARNESS_PLUGINS .*gone\.py: no such file"):
        plugins.load()


def test_method_origin_identifies_the_code(scale: Path) -> None:
    plugins.load([scale])
    cls = methods.get("channel_scale")
    assert plugins.method_origin(cls) == {"module": "scale.py", "sha256": sha256(scale)}
    assert plugins.outside_digest(cls) == f"sha256:{sha256(scale)}"
    shipped = plugins.method_origin(methods.get("spm"))
    assert shipped["module"] == "methods.spm" and shipped["package"] == "segmentation-tuning-harness"
    assert "sha256" not in shipped and plugins.outside_digest(methods.get("spm")) == ""


def test_unknown_method_gets_a_hint_at_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def hint(name: str) -> str:
        with pytest.raises(UserError) as caught:
            methods.get(name)
        return caught.value.hint or ""

    assert hint("zzz").startswith("known: ") and hint("zzz").endswith(" (or load its file with --plugin FILE)")
    assert hint("linea") == "did you mean linear?"
    (tmp_path / "linea.py").write_text(SCALE)
    assert hint("linea") == "did you mean linear? (or load linea.py with --plugin linea.py)"
    plugins.load(["linea.py"])  # its method has another name
    assert hint("linea") == "did you mean linear?"
