"""The files of a published table: a page of Markdown, the runs and their counts."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from harness.runs.store import RunStore
from reports.analysis.evidence import COUNTS, RUNS, counts_of, scores
from reports.publish import FILES, TABLES, main, page
from reports.read.collect import collect
from studies.plan import make_plan
from studies.study import load_study
from tests.support.made_runs import make_older, make_run, make_runs, make_spec
from tests.support.studies_at_hand import write_study


def test_page_has_scores_and_a_comparison_for_each_reference(tmp_path: Path) -> None:
    make_runs(tmp_path, seeds=(0, 1, 2))
    collected = collect(tmp_path)
    text = page(collected, "My study", ["harness", "report", "my study"], ["linear", "spm"])
    assert text.startswith(
        "# My study: scores and costs\n\nTables of `harness report 'my study' --columns score,trained,"
    )
    assert ", once with `--reference linear`, and once with `--reference spm`." in text
    assert "*head only* is `linear`." in text
    for label, rows in collected.finished.groupby("label"):
        assert f"{100 * rows['miou'].mean():.2f} ± {100 * rows['miou'].std():.2f}" in text, label
    assert "compared with head only" in text and "compared with spm" in text and "compared with full" not in text


def test_study_without_the_head_alone_has_a_page(tmp_path: Path, colours: Path) -> None:
    study, store = write_study(tmp_path / "mine.yaml", colours, methods=["spm", "lora"]), RunStore(tmp_path / "runs")
    for cell in make_plan(load_study(study), store, tmp_path).cells[:3]:
        assert cell.spec is not None
        make_run(store.root, cell.spec)
    out = tmp_path / "out"
    assert main([str(study), "--runs", str(store.root), "--data", str(tmp_path), "--out", str(out)]) == 0
    table = (out / TABLES).read_text(encoding="utf-8")
    assert table.startswith("# mine: ") and "--reference" not in table and "compared with" not in table
    assert "### Runs without a score" in table  # one cell of four


@pytest.mark.parametrize("dirty", [True, None])
def test_runs_of_unknown_code_are_refused(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str], dirty: bool | None
) -> None:
    study, store = write_study(tmp_path / "mine.yaml", colours, seeds=1), RunStore(tmp_path / "runs")
    for cell in make_plan(load_study(study), store, tmp_path).cells:
        assert cell.spec is not None
        run = make_run(store.root, cell.spec)
        make_older(run, provenance=json.loads(run.result_path.read_text())["provenance"] | {"dirty": dirty})
    given = [str(study), "--runs", str(store.root), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(given) == 2
    assert "2 runs of code that is not known to be committed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_finished_cells_of_a_study_are_published(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "mine.yaml", colours, title="Mine", methods=["linear", "spm", "lora"])
    store, out = RunStore(tmp_path / "runs"), tmp_path / "out"
    cells = [cell.spec for cell in make_plan(load_study(study), store, tmp_path).cells if cell.spec is not None]
    for spec in cells:
        make_run(store.root, spec)
    make_run(store.root, make_spec("full"))
    given = [str(study), "--runs", str(store.root), "--data", str(tmp_path), "--filter", "label=linear,sp m,spm"]
    assert main([*given, "--out", str(out)]) == 0
    runs, table = pd.read_csv(out / RUNS), (out / TABLES).read_text(encoding="utf-8")
    assert set(runs["fingerprint"]) == {spec.fingerprint for spec in cells if spec.method != "lora"}
    assert scores(counts_of(pd.read_parquet(out / COUNTS))) == pytest.approx(dict(runs[["fingerprint", "miou"]].values))
    assert (
        table.startswith("# Mine: ")
        and "`harness report mine.yaml --filter 'label=linear,sp m,spm' --columns " in table
    )
    assert main([*given, "--out", str(out), "--reference", "lora"]) == 2
    assert "--reference lora: no such method" in capsys.readouterr().err
    assert (out / TABLES).read_text(encoding="utf-8") == table


@pytest.mark.parametrize("blocked", FILES)
def test_no_file_is_replaced_where_one_cannot_be(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str], blocked: str
) -> None:
    study, store, out = (
        write_study(tmp_path / "mine.yaml", colours, seeds=1),
        RunStore(tmp_path / "runs"),
        tmp_path / "out",
    )
    for cell in make_plan(load_study(study), store, tmp_path).cells:
        assert cell.spec is not None
        make_run(store.root, cell.spec)
    (out / blocked).mkdir(parents=True)
    for name in set(FILES) - {blocked}:
        (out / name).write_text("before")
    assert main([str(study), "--runs", str(store.root), "--data", str(tmp_path), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out {out}: {blocked} is a folder")
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert {(out / name).read_text() for name in set(FILES) - {blocked}} == {"before"}


def test_nothing_is_written_without_a_finished_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    assert main(["demo", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: demo: no cell is done yet\n" and not (tmp_path / "out").exists()
