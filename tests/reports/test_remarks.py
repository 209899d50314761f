"""Remarks on a score appear wherever the score does: classes without a label, and what is odd about the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from harness.runs.result import ONLY_FOUND
from harness.runs.store import RunStore
from harness.spec import Spec
from reports.analysis.comparison import Comparison, compare
from reports.read.cited import PublishedScore, match
from reports.read.collect import collect
from reports.render.formats import Table, latex, markdown
from reports.render.numbers import NumberFormat
from reports.render.statistics_tables import dev_test_tables, share_tables, significance_tables
from reports.render.tables import TableLayout, published_table, result_tables
from reports.report import Options, write_report
from studies.plan import make_plan
from studies.progress import table as printed_table
from studies.study import load_study
from tests.support import results
from tests.support.in_process import call, train
from tests.support.made_runs import draw_matrices, make_older, make_run, make_runs, make_spec
from tests.support.studies_at_hand import write_study
from tests.support.tiny_cell import make_dataset

NUMBERS = NumberFormat()
SAID = (
    "The test images have no label of snow: such a class has IoU 0 if it is predicted, and is left out of the mean if "
    "not."
)
SCRIPT = "<script>alert(1)</script>"


def without_snow(spec: Spec) -> np.ndarray:
    """Confusion matrices of images that hold no label of the last class."""
    matrices = draw_matrices(spec, 0.8, 12, 4)
    matrices[:, 3] = 0
    return matrices


def compared(root: Path) -> Comparison:
    """Two methods with two seeds on the test and one on the dev split of meadow, without snow, and on another place."""
    specs = [make_spec(method, seed=seed) for method in ("linear", "spm") for seed in (0, 1)]
    for spec in [*specs, *(make_spec(method, part="dev") for method in ("linear", "spm"))]:
        make_run(root, spec, matrices=without_snow(spec))
    make_runs(root, ["linear", "spm"], datasets=["town"])
    return compare(collect(root), references=["linear"])


def result_table(comparison: Comparison) -> Table:
    (table,) = result_tables(comparison, match([], comparison, "miou"), TableLayout(), NUMBERS)
    return table


def test_class_without_a_label_marks_every_score_of_the_dataset(tmp_path: Path) -> None:
    table = result_table(compared(tmp_path))
    assert table.header[:3] == ["method", "meadow, mIoU (%)", "town, mIoU (%)"]
    assert [(meadow.notes, town.notes) for _, meadow, town, *_ in table.rows] == [("a", "")] * 2
    assert table.footnotes == [f"a: {SAID}"]
    assert SAID in markdown(table) and SAID in latex(table)


def test_class_without_a_label_is_mentioned_with_differences_and_other_scores(tmp_path: Path) -> None:
    comparison = compared(tmp_path)
    for tables in (significance_tables(comparison, NUMBERS), share_tables(comparison, NUMBERS)):
        assert [SAID in table.caption for table in tables] == ["meadow" in table.title for table in tables]
    (tested,) = dev_test_tables(comparison, NUMBERS)
    assert ([cells[3].notes for cells in tested.rows], tested.footnotes) == (["a", "a"], [f"a: {SAID}"])
    score = PublishedScore(setting="s", dataset="meadow", backbone="resnet18", head="fpn:64", method="linear",
                           printed="Linear", value=50, source="a paper", sure="own")  # fmt: skip
    (published,) = published_table(match([score], comparison, "miou"), comparison, NUMBERS)
    assert (published.rows[0][5].notes, published.footnotes) == ("a", [f"a: {SAID}"])


def test_report_says_it_in_words_on_the_page_and_in_csv(tmp_path: Path) -> None:
    compared(tmp_path / "runs")
    run = RunStore(tmp_path / "runs").folder(make_spec("spm", dataset="town"))
    provenance = json.loads(run.result_path.read_text())["provenance"]
    make_older(run, provenance=provenance | {"data": {"warnings": [f"town: {SCRIPT}"]}})
    written = write_report(collect(tmp_path / "runs"), [], tmp_path / "out", Options())
    printed = call("report", "--runs", tmp_path / "runs", "--out", tmp_path / "again")
    assert SAID in printed.out and f"warning: town: {SCRIPT}" in printed.err
    assert [SAID in text for _, text in written.answers] == ["meadow" in name for name, _ in written.answers]
    html = (tmp_path / "out/index.html").read_text()
    assert html.count("<li>town: &lt;script&gt;alert(1)&lt;/script&gt;</li>") == 1 and SCRIPT not in html
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    remarks = {run["id"]: run["remarks"] for run in data["runs"]}
    assert remarks[run.fingerprint] == [f"Warning: town: {SCRIPT}"]
    assert remarks[make_spec("spm").fingerprint] == [SAID]
    assert remarks[make_spec("linear", dataset="town").fingerprint] == []
    for name in ("results.csv", "runs.csv"):
        head, *lines = (tmp_path / "out/tables" / name).read_text().splitlines()
        assert '"unlabelled"' in head and '"warnings"' in head
        assert all(('"snow"' in line) == ('"meadow"' in line) for line in lines)


def test_run_records_what_is_odd_about_its_data_as_its_log_says_it(tmp_path: Path, tiny: Path) -> None:
    data = make_dataset(tmp_path / "odd", ignored_rows=0)
    (data / "dataset.yaml").write_text("classes: [brick, grass, water, snow]\n")
    shutil.copy(data / "images/train/3.png", data / "images/test/0.png")
    run = train(data, tiny, tmp_path / "runs")
    warnings = ["odd: class snow never occurs in any mask",
                "odd: train and test share 1 equal image file, such as train/3 and test/0"]  # fmt: skip
    assert json.loads((run / "result.json").read_text())["provenance"]["data"]["warnings"] == warnings
    assert all(f"warning: {text}" in (run / "log.txt").read_text() for text in warnings)
    table = result_table(compare(collect(tmp_path / "runs")))
    assert table.footnotes == [f"a: {SAID}", *(f"Warning: {text}" for text in warnings)]


def test_warnings_about_the_data_are_shown_once_below_the_scores(tmp_path: Path) -> None:
    recorded = (["a leak"], ["a leak", "odd"], None, 7)  # the last two: an earlier version, and something else
    for run, texts in zip(make_runs(tmp_path, ["linear", "spm"]), recorded, strict=True):
        provenance = json.loads(run.result_path.read_text())["provenance"]
        make_older(run, provenance=provenance | ({} if texts is None else {"data": {"warnings": texts}}))
    comparison = compare(collect(tmp_path))
    assert result_table(comparison).footnotes == ["Warning: a leak", "Warning: odd"]
    assert set(comparison.runs["warnings"]) == {"a leak", "a leak | odd", ""}


def test_class_without_a_label_is_in_the_tables_of_commands(tmp_path: Path, colours: Path) -> None:
    study = load_study(write_study(tmp_path / "s.yaml", colours, methods=["linear"], seeds=1))
    store = RunStore(tmp_path / "runs")
    (cell,) = make_plan(study, store, tmp_path).cells
    assert cell.spec is not None
    scores = results.scores_of(np.array([[[5, 1, 1], [1, 5, 1], [0, 0, 0]]]), ["brick", "grass", "water"])
    run = store.folder(cell.spec)
    run.begin(cell.spec, 1)
    results.finish(run, results.make_result(cell.spec, metrics=scores))
    (line,) = printed_table(make_plan(study, store, tmp_path))
    assert line["state"] == "done, no label of water"
    assert call("list", "runs", "--runs", store.root).out.splitlines()[1].endswith("  done, no label of water")


def test_row_that_finds_a_single_class_is_marked_in_every_table(tmp_path: Path, colours: Path) -> None:
    study = load_study(write_study(tmp_path / "s.yaml", colours, methods=["linear", "bias", "norm"], seeds=2))
    store = RunStore(tmp_path / "runs")
    cells = make_plan(study, store, tmp_path).cells
    for cell in cells:
        assert cell.spec is not None
        method, seed = cell.spec.method, cell.spec.seed
        matrices = nothing_but_brick(besides=method == "bias" or (method == "norm" and seed == 1))
        scores = results.scores_of(matrices, ["brick", "grass", "water"])
        run = store.folder(cell.spec)
        run.begin(cell.spec, 1)
        results.finish(run, results.make_result(cell.spec, metrics=scores))
    states = {line["method"]: line["state"] for line in printed_table(make_plan(study, store, tmp_path))}
    assert states == {
        "head only": "done, finds only brick",
        "bias": "done",
        "norm": "done, 1 of 2 runs finds only brick",
    }
    listed = call("list", "runs", "--runs", store.root).out.splitlines()[1:]
    assert sorted(line.endswith("  done, finds only brick") for line in listed) == [False] * 3 + [True] * 3
    table = result_table(compare(collect(store.root)))
    notes = dict(line.split(": ", 1) for line in table.footnotes)
    assert {row[0].text: notes.get(row[1].notes) for row in table.rows} == {
        "linear": f"finds only brick: {ONLY_FOUND}",
        "norm": f"1 of 2 runs finds only brick: {ONLY_FOUND}",
        "bias": None,
    }


def nothing_but_brick(besides: bool) -> np.ndarray:
    """Confusion matrices of one image that is labelled with three classes; `besides`: a pixel of grass is found too."""
    matrix = np.array([[[90, 0, 0], [7, 0, 0], [3, 0, 0]]])
    matrix[0, 1] += [-1, 1, 0] if besides else [0, 0, 0]
    return matrix


def test_run_that_finds_a_single_class_says_so_in_its_log(tmp_path: Path, tiny: Path) -> None:
    data = make_dataset(tmp_path / "rare")
    for path in (data / "masks/train").glob("*.png"):  # one pixel of grass and none of water: nothing to learn from
        mask = np.zeros_like(np.asarray(Image.open(path)))
        mask[-1, -1] = 1
        Image.fromarray(mask).save(path)
    run = train(data, tiny, tmp_path / "runs")
    found = json.loads((run / "result.json").read_text())["metrics"]["per_class"]
    assert [one["name"] for one in found if one["acc"]] == ["brick"]
    assert f"warning: finds only brick: {ONLY_FOUND}" in (run / "log.txt").read_text()
