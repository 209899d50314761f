"""`harness report`: one complete folder, the same bytes from the same runs, and no torch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from harness.errors import UserError
from reports.analysis.comparison import check_metric
from reports.read.cited import load_published
from reports.read.collect import Collected, collect
from reports.report import MARKER, Options, filtered, replacing, write_report
from tests.support.made_runs import end_run, make_run, make_runs, make_search, make_spec
from tests.support.tiny_cell import environment

WITHOUT_TORCH = (
    "import sys; from harness.cli.main import main\n"
    "sys.argv[0] = 'harness'\n"
    "try: main()\n"
    "finally: assert not {'torch', 'optuna', 'mlflow'} & sys.modules.keys()"
)


def report(*arguments: str | Path, where: Path) -> subprocess.CompletedProcess[str]:
    """`harness report ARGUMENTS` in a subprocess, which fails if torch was imported by its end."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "report", *map(str, arguments)],
        cwd=where, env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_linear_with_a_larger_head_is_called_head_only_in_print(tmp_path: Path) -> None:
    make_runs(tmp_path / "runs", ["linear", "spm"], seeds=[0, 1])
    write_report(collect(tmp_path / "runs"), (), tmp_path / "report", Options(reference="linear"))
    results = (tmp_path / "report/tables/all.md").read_text()
    assert "head only" in results and "linear" not in results
    assert results.startswith("## Answer\n\n- resnet18, meadow, fpn:64, brief: spm has the highest mIoU")
    assert set(pd.read_csv(tmp_path / "report/tables/significance.csv").reference) == {"head only"}
    assert "head only" in (tmp_path / "report/index.html").read_text()
    assert set(pd.read_parquet(tmp_path / "report/data.parquet").label) == {"linear", "spm"}


def test_linear_with_a_linear_head_keeps_its_name(tmp_path: Path) -> None:
    for method in ("linear", "spm"):
        make_run(tmp_path / "runs", make_spec(method, head="linear"))
    write_report(collect(tmp_path / "runs"), (), tmp_path / "report", Options())
    assert set(pd.read_csv(tmp_path / "report/tables/results.csv").label) == {"linear", "spm"}


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of many states, folders that are no runs, and names that are markup, formulas or commands."""
    root = tmp_path_factory.mktemp("messy") / "runs"
    classes = ("<script>alert(1)</script>", "=cmd()", r"\input{/etc/passwd}", "a|b\nc")
    for seed in (0, 1):
        for method in ("linear", "spm", "full"):
            make_run(root, make_spec(method, seed=seed), classes=classes)
    make_run(root, make_spec("<b>bold</b>", dataset="=1+1"), classes=classes)
    end_run(root, make_spec("vpt_deep"), "unsupported", "a CNN has no <i>tokens</i>")
    end_run(root, make_spec("lora"), "failed", "=cmd() & \\end{table}")
    make_run(root, make_spec("norm")).result_path.write_text("{")
    make_run(root, make_spec("norm", seed=1)).confusions_path.unlink()
    (root / "0123456789abcdef").mkdir()
    (make_search(root) / "trials.json").write_text("[{}]")
    return root


@pytest.fixture(scope="module")
def written(messy: Path) -> Path:
    """A report of them by the command."""
    done = report("--runs", messy, "--out", "out", where=messy.parent)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()[:-2]
    assert [line.partition(": ")[0] for line in answers] == [
        "resnet18, =1+1, fpn:64, brief",
        "resnet18, meadow, fpn:64, brief",
    ]
    assert done.stdout.splitlines()[-2:] == [
        "2 settings, runs: 1 damaged, 8 done, 1 failed, 1 unsupported",
        "out/index.html",
    ]
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("warning: ")] == [
        "searches/spm-resnet18-meadow-0a1b2c3d",
        "0123456789abcdef",
    ]
    return messy.parent / "out"


def test_importing_the_report_does_not_import_torch() -> None:
    code = (
        "import sys, reports.report, reports.cli; assert not {'torch', 'timm', 'optuna', 'mlflow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_report_has_page_plots_tables_and_data(written: Path) -> None:
    files = digests(written).keys()
    assert {"index.html", "data.parquet", "tables/results.csv", "tables/results-1.md", "tables/results-1.tex"} <= files
    assert {Path(name).suffix for name in files if name.startswith("plots/")} == {".svg"}


def test_data_hold_every_run_with_exact_scores(written: Path, messy: Path) -> None:
    data = pd.read_parquet(written / "data.parquet").set_index("fingerprint")
    runs = collect(messy).runs.set_index("fingerprint")
    assert data["miou"].to_dict() == pytest.approx(runs["miou"].to_dict(), rel=0, nan_ok=True)
    assert len(data) == len(runs) and "path" not in data
    first = runs.index[runs["state"] == "done"][0]
    result = json.loads((messy / first / "result.json").read_text())
    assert list(data.loc[first, "class_iou"]) == [of["iou"] for of in result["metrics"]["per_class"]]


def test_tables_and_data_contain_no_path(written: Path, messy: Path) -> None:
    for path in [written / "data.parquet", *(written / "tables").iterdir()]:
        assert str(messy.parent).encode() not in path.read_bytes(), path


def test_same_runs_give_same_bytes(written: Path, messy: Path, tmp_path: Path) -> None:
    done = report("--runs", messy, "--out", tmp_path / "second", where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "second") == digests(written)


def test_report_replaces_an_earlier_one(tmp_path: Path) -> None:
    with replacing(tmp_path / "out") as folder:
        (folder / "old.txt").write_text("old")
    with replacing(tmp_path / "out") as folder:
        (folder / "new.txt").write_text("new")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MARKER, "new.txt"]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_report_does_not_replace_a_file_that_it_did_not_write(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        with replacing(out) as folder:
            (folder / "plots").mkdir()
            (folder / "plots" / "a.svg").write_text("a plot")
    (out / ".DS_Store").touch()  # of the desktop, as soon as somebody opens the folder
    (out / "plots" / "notes.md").write_text("mine")
    with (
        pytest.raises(UserError, match=r"out: holds plots/notes.md, not written by `harness report`; move that away"),
        replacing(out),
    ):
        pass
    assert (out / "plots" / "notes.md").read_text() == "mine"
    (out / "plots" / "notes.md").unlink()
    with replacing(out) as folder:
        (folder / "new.txt").write_text("new")
    assert (out / "new.txt").exists()


def test_interrupted_report_leaves_the_earlier_one(tmp_path: Path) -> None:
    with replacing(tmp_path / "out") as folder:
        (folder / "old.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "out") as folder:
        (folder / "new.txt").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "old.txt").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_other_folders_are_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a report of the harness"), replacing(out):
        pass
    assert (out / "chapter.txt").read_text() == "years of work"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    root = tmp_path_factory.mktemp("small")
    make_runs(root, ["linear", "spm", "lora"], ["resnet18", "deit_tiny"], seeds=[0])
    make_search(root, trials=3)
    return collect(root)


def test_filter(small: Collected) -> None:
    chosen = filtered(small, ["method=spm,l*a", "backbone=res*"])
    assert set(chosen.reported["label"]) == {"spm", "lora"}
    assert set(chosen.reported["backbone"]) == {"resnet18"}
    assert set(chosen.per_class["fingerprint"]) <= set(chosen.runs["fingerprint"])
    assert len(chosen.searches) == len(filtered(small, ["budget=brief", "seed=0"]).searches) == 1
    assert filtered(small, ["backbone=deit*"]).searches == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spm", "expected NAME=PATTERN"),
        ("methods=spm", "no such name; did you mean method"),
        ("method=absent", "no run is left; there are: linear, lora, spm"),
    ],
)
def test_invalid_filter_is_an_error(small: Collected, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        filtered(small, [text])


@pytest.mark.parametrize(
    ("metric", "message"),
    [("miuo", "no such metric; did you mean miou"), ("class:wather", "no run has such a class; did you mean water")],
)
def test_unknown_metric_is_an_error(small: Collected, metric: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_metric(small, metric)


def test_formats_of_plots(small: Collected, tmp_path: Path) -> None:
    chosen = filtered(small, ["backbone=resnet18"])
    write_report(chosen, [], tmp_path / "out", Options(formats=("pdf", "png")))
    assert {path.suffix for path in (tmp_path / "out/plots").iterdir()} == {".svg", ".pdf", ".png"}
    with pytest.raises(UserError, match="--plots jpg: no such format; "):
        Options(formats=("jpg",))


def test_unknown_reference_is_an_error_before_anything_is_written(small: Collected, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--reference lroa: no such method; did you mean lora"):
        write_report(small, load_published(), tmp_path / "out", Options(reference="lroa"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_report_in_another_metric(small: Collected, tmp_path: Path) -> None:
    chosen = filtered(small, ["backbone=resnet18"])
    comparison, _ = write_report(chosen, [], tmp_path / "out", Options(metric="class:water", reference="lora"))
    assert set(comparison.significance["reference"]) == {"lora"}
    assert "| method | meadow, IoU of water (%) |" in (tmp_path / "out/tables/results-1.md").read_text()


def test_what_a_killed_report_left_is_removed(tmp_path: Path) -> None:
    left, mine = tmp_path / ".out.abc", tmp_path / ".out.mine"
    for folder in (left / "report", left / "earlier"):
        folder.mkdir(parents=True)
        (folder / MARKER).touch()
    (left / "earlier" / "index.html").write_text("earlier")
    mine.mkdir()
    for folder in (left, mine):
        os.utime(folder, (0, 0))
    with pytest.raises(KeyError), replacing(tmp_path / "out"):
        raise KeyError
    assert (tmp_path / "out" / "index.html").read_text() == "earlier"
    assert not left.exists() and mine.exists()
