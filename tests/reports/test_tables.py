"""Tables as people read them; text from other people's files stays text in every format."""

from __future__ import annotations

import csv
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.errors import UserError
from reports.analysis.comparison import Comparison, compare
from reports.read.cited import PublishedScore, load_published, match
from reports.read.collect import collect
from reports.render.formats import Table, TableCell, latex, markdown, write_csv
from reports.render.numbers import NumberFormat
from reports.render.statistics_tables import (
    dev_test_tables,
    overall_tables,
    share_tables,
    significance_tables,
)
from reports.render.tables import TableLayout, absent_table, result_tables
from tests.support.made_runs import end_run, make_run, make_runs, make_spec

NASTY = [
    "=cmd()",
    "<script>alert(1)</script>",
    r"\input{/etc/passwd}",
    "a|b",
    "one\ntwo",
    "$x_1^2$ & 5 % #~",
    "--",
    "né漢",
]


def results(comparison: Comparison, layout: TableLayout | None = None, numbers: NumberFormat | None = None) -> Table:
    """The one table of results."""
    nothing = match([], comparison, "miou")
    (table,) = result_tables(comparison, nothing, layout or TableLayout(), numbers or NumberFormat())
    return table


def row(table: Table, label: str) -> dict[str, TableCell]:
    """One method's cells by their column."""
    (cells,) = (cells for cells in table.rows if cells[0].text == label)
    return dict(zip(table.header, cells, strict=True))


def test_cells_have_mean_and_standard_deviation(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"], datasets=["meadow", "town"])
    comparison = compare(collect(tmp_path))
    table = results(comparison)
    assert table.header[:3] == ["method", "meadow, mIoU (%)", "town, mIoU (%)"]
    summary = comparison.summary.set_index(["label", "dataset"])
    mean, spread = summary.loc[("linear", "town"), ["mean", "std"]]
    assert row(table, "linear")["town, mIoU (%)"].text == f"{100 * mean:.2f} ± {100 * spread:.2f}"
    assert table.caption.startswith("Mean ± standard deviation over 2 seeds")
    about_time = "; time counts what was read from a cache as when it was computed"
    assert about_time in table.caption
    assert about_time not in results(comparison, TableLayout(columns=("score", "trained"))).caption


def test_each_backbone_has_a_table(tmp_path: Path) -> None:
    make_runs(tmp_path, backbones=["resnet18", "deit_tiny"])
    comparison = compare(collect(tmp_path))
    tables = result_tables(comparison, match([], comparison, "miou"), TableLayout(), NumberFormat())
    assert [table.title for table in tables] == ["deit_tiny, fpn:64, brief", "resnet18, fpn:64, brief"]


def test_cost_columns(tmp_path: Path) -> None:
    make_runs(tmp_path, ["spm"])
    texts = {name: cell.text for name, cell in row(results(compare(collect(tmp_path))), "spm").items()}
    assert texts["trained, M"] == "0.0355"  # 35,494
    assert texts["head, M"] == "0.0500"  # 50,000
    assert texts["of backbone, %"] == "3.55"  # of 1,000,000
    assert texts["delta, MiB"] == "0.326"  # 4 bytes for each of 85,494
    assert texts["memory, GiB"] == "0.250"  # 256 MiB
    assert texts["time, s"] == "10.4"
    assert texts["inference, ×"] == "1.10"


def test_zero_cost_is_zero_and_missing_cost_is_a_dash(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear"])
    end_run(tmp_path, make_spec("vpt_deep"), "unsupported", "a CNN has no tokens")
    table = results(compare(collect(tmp_path)))
    assert row(table, "linear")["trained, M"].text == "0"
    assert "0" not in {cell.text for cell in row(table, "vpt_deep").values()}


def test_unsupported_cell_is_a_dash_with_a_footnote(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear"])
    for seed in (0, 1):
        end_run(tmp_path, make_spec("vpt_deep", seed=seed), "unsupported", "a CNN has no tokens")
    table = results(compare(collect(tmp_path)))
    cell = row(table, "vpt_deep")["meadow, mIoU (%)"]
    assert (cell.text, cell.notes) == ("–", "a")
    assert table.footnotes == ["a: unsupported: a CNN has no tokens"]
    assert table.rows[-1][0].text == "vpt_deep"


def test_failed_cell_shows_its_state_and_is_listed(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear"])
    end_run(tmp_path, make_spec("full"), "out_of_memory", "after step 3")
    comparison = compare(collect(tmp_path))
    assert row(results(comparison), "full")["meadow, mIoU (%)"].text == "out of memory"
    (listed,) = absent_table(comparison, [("0123456789abcdef", "no spec")])
    assert [[cell.text for cell in cells[1:]] for cells in listed.rows] == [
        ["full", "0", "out of memory", "after step 3"],
        ["–", "–", "not read", "no spec"],
    ]


def test_failed_seed_is_a_footnote_of_the_mean(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"], seeds=[0, 1])
    end_run(tmp_path, make_spec("spm", seed=2), "diverged", "at step 7")
    make_run(tmp_path, make_spec("linear", seed=2))
    table = results(compare(collect(tmp_path)))
    cell = row(table, "spm")["meadow, mIoU (%)"]
    assert "(n = 2)" in cell.text
    assert (cell.notes, table.footnotes) == ("a", ["a: seed 2 diverged: at step 7"])


def test_best_is_bold_and_second_underlined() -> None:
    rows = [
        [TableCell("a", "text"), TableCell("2", mark="best")],
        [TableCell("b", "text"), TableCell("1", mark="second", notes="a")],
    ]
    table = Table("t", "T", ["method", "x"], rows)
    assert "| a | **2** |\n| b | <ins>1</ins><sup>a</sup> |" in markdown(table)
    assert "{}a & \\textbf{2} \\\\\n{}b & \\underline{1}\\textsuperscript{a} \\\\" in latex(table)


def test_sort_order_with_missing_values_last(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm", "full"])
    end_run(tmp_path, make_spec("vpt_deep"), "unsupported", "because")
    comparison = compare(collect(tmp_path))

    def order(sort: str) -> list[str]:
        return [cells[0].text for cells in results(comparison, TableLayout(sort=sort)).rows]

    assert order("score") == ["full", "spm", "linear", "vpt_deep"]
    assert order("-score") == ["linear", "spm", "full", "vpt_deep"]
    assert order("trained") == ["linear", "spm", "full", "vpt_deep"]
    assert order("label") == ["full", "linear", "spm", "vpt_deep"]


def test_columns_in_the_chosen_order(tmp_path: Path) -> None:
    make_runs(tmp_path)
    table = results(compare(collect(tmp_path)), TableLayout(columns=("trained", "score")))
    assert table.header == ["method", "trained, M", "meadow, mIoU (%)"]


@pytest.mark.parametrize(("flag", "layout"), [("--columns", {"columns": ("memroy",)}), ("--sort", {"sort": "-memroy"})])
def test_unknown_column_is_an_error(flag: str, layout: dict) -> None:
    with pytest.raises(UserError, match=f"{flag} memroy: no such column; did you mean memory"):
        TableLayout(**layout)


def test_number_formats() -> None:
    assert NumberFormat().score(0.48314) == "48.31"
    assert NumberFormat(unit="share").score(0.48314) == "0.4831"
    assert NumberFormat(decimals=1, sign=",").difference(-0.48314) == "−48,3"
    assert NumberFormat().difference(0.001) == "+0.10"
    assert NumberFormat().score(float("nan")) == NumberFormat().short(float("nan")) == "–"
    assert [NumberFormat().short(value) for value in (0, 0.00355, 12.345, 198.58, 12345.6)] == [
        "0",
        "0.00355",
        "12.3",
        "199",
        "12346",
    ]


def test_every_verdict_is_equally_bold(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm", "norm"], seeds=[0, 1, 2], accuracies={"linear": 0.7, "spm": 0.8, "norm": 0.7})
    (table,) = significance_tables(compare(collect(tmp_path), references=["linear"]), NumberFormat())
    assert table.title == "resnet18, meadow, fpn:64, brief: compared with linear"
    assert [(cells[0].text, cells[-1].text) for cells in table.rows] == [
        ("spm", "better"),
        ("norm", "no significant difference"),
    ]
    assert markdown(table).count("**") == 4


def test_method_without_verdict_has_a_footnote(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"], seeds=[0, 1])
    make_run(tmp_path, make_spec("lora", seed=7))
    make_run(tmp_path, make_spec("norm", seed=0))
    (table,) = significance_tables(compare(collect(tmp_path), references=["linear"]), NumberFormat())
    assert {cells[0].text: (cells[-1].text, cells[-1].notes) for cells in table.rows} == {
        "spm": ("better", ""),
        "norm": ("no verdict", "a"),
        "lora": ("not comparable", "b"),
    }
    assert table.footnotes == ["a: one seed", "b: no seed in common"]


@pytest.mark.parametrize(
    ("seeds", "per_group", "sentence"),
    [
        (1, 1, "One seed shows how these trained networks differ, not how the methods do: there is no verdict."),
        (2, 1, "Of two equal methods with two seeds, one is called better in up to 12 %"),
        (3, 1, "Test images: 12 in 12 groups."),
        (3, 4, "With fewer than 10 groups, the variance over images is poorly estimated."),
        (3, 1, "Needed to find a true difference with a probability of 0.8"),
    ],
)
def test_table_of_verdicts_states_its_basis(tmp_path: Path, seeds: int, per_group: int, sentence: str) -> None:
    make_runs(tmp_path, ["linear", "spm"], seeds=range(seeds), per_group=per_group)
    (table,) = significance_tables(compare(collect(tmp_path), references=["linear"]), NumberFormat())
    assert sentence in table.caption


def test_table_of_results_marks_what_is_not_worse_than_the_best(tmp_path: Path) -> None:
    accuracies = {"full": 0.8, "spm": 0.799, "linear": 0.6}
    make_runs(tmp_path, list(accuracies), seeds=range(4), accuracies=accuracies)
    table = results(compare(collect(tmp_path)))
    marks = {cells[0].text: cells[1].text[-1] for cells in table.rows}
    assert sorted([marks["full"] == "≈", marks["spm"] == "≈"]) == [False, True] and marks["linear"] != "≈"
    assert "≈: not significantly worse than the best" in table.caption


def test_one_seed_is_marked_in_the_table_of_results(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"], seeds=[0])
    table = results(compare(collect(tmp_path)))
    assert row(table, "linear")["meadow, mIoU (%)"].text.endswith(" ?")
    assert "?: no verdict on its difference to the best" in table.caption


def test_shares_of_more_classes_than_fit_are_summed(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"], classes=[f"class {number}" for number in range(15)])
    (table,) = share_tables(compare(collect(tmp_path), references=["linear"]), NumberFormat())
    assert len(table.header) == 2 + 12 + 1 and table.header[-1] == "3 others"
    total, *shares = (float(cell.text.replace("−", "-")) for cell in table.rows[0][1:])
    assert sum(shares) == pytest.approx(total, abs=0.08)  # each is rounded


def test_dev_and_test_with_hyperparameters_at_an_edge(tmp_path: Path) -> None:
    for method, accuracy in (("linear", 0.6), ("spm", 0.7), ("full", 0.8)):
        for part in ("dev", "report"):
            make_run(tmp_path, make_spec(method, part=part), accuracy)
    collected = collect(tmp_path)
    doubts = np.where(collected.runs["label"] == "spm", "lr=0.01 is the highest tried", "")
    runs = collected.runs.assign(doubts=doubts)
    (table,) = dev_test_tables(compare(replace(collected, runs=runs)), NumberFormat())
    assert [cells[0].text for cells in table.rows] == ["full", "spm", "linear"]
    assert table.caption.startswith("Kendall's τ between the two orders: 1.00.")
    assert table.footnotes == ["a: about its search: lr=0.01 is the highest tried"]


@pytest.mark.parametrize("datasets", [2, 5])
def test_few_settings_do_not_generalise(tmp_path: Path, datasets: int) -> None:
    make_runs(tmp_path, ["linear", "spm", "full"], datasets=[f"place {number}" for number in range(datasets)])
    overall, agreement = overall_tables(compare(collect(tmp_path)), NumberFormat())
    assert overall.title == f"Over {datasets} settings"
    assert ("do not generalise" in overall.caption) == (datasets < 5)
    assert (overall.rows[0][2].text == "–") == (datasets < 5)
    assert len(agreement.rows) == datasets * (datasets - 1) / 2


def test_score_without_any_class_is_undefined(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear"], seeds=[0])
    make_run(tmp_path, make_spec("spm"), matrices=np.zeros((3, 4, 4), np.int64))
    cell = row(results(compare(collect(tmp_path))), "spm")["meadow, mIoU (%)"]
    assert cell.text == "undefined"


@pytest.mark.parametrize("text", NASTY)
def test_text_is_inert_in_markdown(text: str) -> None:
    (line,) = markdown(Table("t", "T", ["method"], [[TableCell(text, "text")]])).splitlines()[4:]
    assert line.count("|") - line.count(r"\|") == 2
    assert "<" not in line and "$x" not in line.replace(r"\$", "")


@pytest.mark.parametrize("text", [*NASTY, "-1", "@SUM(1)", "\t=1", " =1"])
def test_text_is_inert_in_spreadsheets(tmp_path: Path, text: str) -> None:
    write_csv(tmp_path / "t.csv", pd.DataFrame({"label": [text], "difference": [-0.1234567890123456]}))
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as handle:
        (read,) = csv.DictReader(handle)
    assert read["label"].lstrip(" ")[0] not in "=+-@\t\r\n"
    assert read["label"].removeprefix("'") == text
    assert float(read["difference"]) == -0.1234567890123456


def test_latex_compiles_with_any_text(tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("there is no pdflatex: apt-get install texlive-latex-recommended")
    rows = [
        [TableCell(text, "text", notes="a"), TableCell("−48,31 ± 0,10 ≈", mark="best")] for text in ("[b]", "é", *NASTY)
    ]
    table = Table("t", r"100 % of \evil", ["method", "mIoU (%)"], rows, "Kendall's τ × “quotes”", [rf"a: {NASTY}"])
    (tmp_path / "table.tex").write_text(latex(table), encoding="utf-8")
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\usepackage[T1]{fontenc}\n"
        "\\begin{document}\n\\input{table.tex}\n\\end{document}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").exists()
    assert "root:" not in done.stdout


def cited(**fields: object) -> PublishedScore:
    values = {"setting": "a table", "dataset": "meadow", "backbone": "resnet18 resnet18.*", "head": "fpn:64",
              "method": "spm", "printed": "SPM", "value": 60.0, "source": "a paper", "sure": "own"}  # fmt: skip
    return PublishedScore.model_validate({**values, **fields})


def test_published_score_with_difference(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"])
    comparison = compare(collect(tmp_path))
    matched = match([cited(trained_millions=0.2, head_counted=True)], comparison, "miou")
    (found,) = matched.to_dict("records")
    mean = comparison.summary.set_index("label").loc["spm", "mean"]
    assert (found["value"], found["trained"], found["measured_label"]) == (0.6, 200_000, "spm")
    assert found["difference"] == pytest.approx(mean - 0.6)
    (table,) = result_tables(comparison, matched, TableLayout(), NumberFormat())
    cell = row(table, "spm")["meadow, published (difference)"]
    assert cell.text == f"60.00 ({100 * (mean - 0.6):+.2f})".replace("-", "−")
    assert table.footnotes == ["a: published by a paper (own)"]


@pytest.mark.parametrize("other", [{"dataset": "town"}, {"backbone": "resnet1"}, {"head": "fpn"}, {"metric": "mdice"},
                                   {"evaluation": "multi-scale"}])  # fmt: skip
def test_published_score_of_another_setting_is_not_matched(tmp_path: Path, other: dict) -> None:
    make_runs(tmp_path, ["spm"])
    assert match([cited(**other)], compare(collect(tmp_path)), "miou").empty


def test_conflicting_sources_are_both_shown(tmp_path: Path) -> None:
    make_runs(tmp_path, ["spm"])
    comparison = compare(collect(tmp_path))
    matched = match([cited(), cited(value=50.0, source="another")], comparison, "miou")
    (table,) = result_tables(comparison, matched, TableLayout(), NumberFormat())
    cell = row(table, "spm")["meadow, published (difference)"]
    assert cell.text.startswith("60.00 (") and "; 50.00 (" in cell.text
    assert cell.notes == "a,b"


def test_shipped_published_scores() -> None:
    rows = load_published()
    assert {(row.setting, row.head_counted) for row in rows if row.trained_millions is not None} >= {
        ("ADE20K, SETR-PUP, ViT-L/16 (ImageNet-21k)", True),
        ("ADE20K, UperNet, Swin-L (ImageNet-22k)", False),
    }
    assert all(row.head_counted is not None for row in rows if row.trained_millions is not None)
    assert "spm" not in {row.method for row in rows}
    full = [row.value for row in rows if row.setting.startswith("ADE20K, UperNet") and row.method == "full"]
    assert full == [52.10, 51.18]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("meadow,r,fpn,spm,x,own", "line 2: value: x"),
        ("meadow,r,fpn,spm,160,own", "line 2: value: 160"),
        ("meadow,r,fpn,spm,60,hearsay", "line 2: sure: hearsay"),
        ("meadow,r,fpn,,60,own", "line 2: method: "),
        (f"meadow,r,fpn,{'x' * 200_000},60,own", "line 2: field larger than field limit"),
    ],
)
def test_invalid_line_of_published_scores_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "my.csv"
    dataset, rest = line.split(",", 1)
    path.write_text(f"setting,printed,source,dataset,backbone,head,method,value,sure\ns,p,q,{dataset},{rest}\n")
    with pytest.raises(UserError) as caught:
        load_published([path])
    assert str(caught.value).startswith(f"--published {path}: {message}")
