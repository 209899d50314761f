"""`python -m benchmarks` runs every measurement on the smallest sizes; the values other than times are correct."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.processes

LOOPS = "The loop: images per second"
METHODS = "Methods relative to full: test_resnet"
SHARING = "Runs of `linear` that share frozen features"
OPTIONS = "A step with an option over the plain step"


@pytest.fixture(scope="module")
def tables(start, colours, tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    """The rows of every table of one command, by the table's title; `below` is what stands below the table."""
    file = tmp_path_factory.mktemp("benchmarks") / "tables.md"
    cell = ["--backbone", "test_resnet", "--head", "fpn:16", "--dataset", colours, "--crop", "32", "--batch", "4"]
    size = ["--steps", "2", "--rounds", "1", "--trials", "2", "--workers", "0"]
    chosen = ["--methods", "spm,vpt_deep", "--options", "channels-last,bf16"]
    done = start(*cell, *size, *chosen, "--markdown", file, module="benchmarks")
    assert done.wait() == 0, done.stderr
    assert done.stderr == ""
    assert file.read_text(encoding="utf-8") == done.stdout.removesuffix("\n") + "\n"
    return {part.partition("\n")[0]: rows_of(part) for part in done.stdout.split("### ")[1:]}


def rows_of(text: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    columns, _, *rows = lines
    return [{"below": text.rpartition("|")[2].strip()} | dict(zip(columns, row, strict=True)) for row in rows]


def test_three_loops_train_the_same_tensors(tables):
    [row] = tables[LOOPS]
    assert row["method"] == "spm"
    assert row["trained tensors"] == "equal to the bit"
    assert _ratio(row["over a plain loop"]) > 0 and _ratio(row["over mmengine's Runner"]) > 0


def test_unsupported_method_is_listed_with_the_reason(tables):
    for title in (LOOPS, METHODS, OPTIONS):
        assert tables[title][0]["below"].startswith("vpt_deep on test_resnet: ")


def test_methods_are_compared_with_full(tables):
    rows = {row["method"]: row for row in tables[METHODS]}
    assert rows.keys() == {"spm"}
    spm = rows["spm"]
    assert 0 < float(spm["saved"]) < 1 and 0 < float(spm["peak"]) < 1
    assert float(spm["saved, MiB"]) < float(spm["peak, MiB"])
    assert float(spm["delta"]) >= 1
    assert _ratio(spm["step"]) > 0


def test_sharing_has_a_ratio_for_every_goal(tables):
    rows = tables[SHARING]
    for head in ("linear", "fpn:16"):
        aims = [row["aim for the linear probe"] for row in rows if row["head"] == head]
        assert aims == ["at most 2, of 16", "", "", "at least 5", "at least 3"]
    assert all(_ratio(row["ratio"]) > 0 for row in rows)


def test_step_options_state_whether_results_change(tables):
    [row] = tables[OPTIONS]
    assert _ratio(row["bf16"]) > 0 and not row["bf16"].endswith("=")
    assert _ratio(row["channels-last"].removesuffix("=")) > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "loop"], "error: --only loop: no such name; did you mean loops?"),
        (["--methods", "spn"], "error: --methods spn: no such name; did you mean spm"),
        (["--rounds", "0"], "error: --rounds 0: use 1 or more"),
    ],
)
def test_wrong_argument_is_a_one_line_error(start, arguments, expected):
    done = start(*arguments, module="benchmarks")
    assert done.wait() == 2
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1


def _ratio(text: str) -> float:
    """`0.98 (0.95 to 1.02)` -> 0.98."""
    middle, low, high = (float(word) for word in text.replace("(", "").replace(")", "").replace("to", "").split())
    assert low <= middle <= high
    return middle
