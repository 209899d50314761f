"""The styles of methods, and the contents of the plots."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from harness.method import methods
from reports.analysis.comparison import compare
from reports.read.cited import PublishedScore, match
from reports.read.collect import Collected, collect
from reports.render import plots
from reports.render.plots.context import RC, Plot
from reports.render.plots.saving import FORMATS, save
from reports.render.style import DARK, HUES, INK, PAPER, REFERENCES, series_styles, theme, themed
from tests.support.made_runs import make_run, make_runs, make_search, make_spec

BLINDNESS = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
OKABE_ITO = 0.076
"""The least distance, by the measure below, between two colours of the palette that journals recommend."""


def linear_rgb(colour: str) -> np.ndarray:
    share = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Björn Ottosson's perceptual space, 2020."""
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
              [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
              [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ rgb.clip(0, 1))


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio."""
    light, dark = sorted((float(linear_rgb(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_hues_are_distinguishable_with_every_colour_blindness(dark: bool) -> None:
    colours = [DARK[hue] if dark else hue for hue in (INK, *HUES)]
    for name, seen in BLINDNESS.items():
        for one, other in itertools.combinations(colours, 2):
            distance = np.linalg.norm(
                oklab(np.array(seen) @ linear_rgb(one)) - oklab(np.array(seen) @ linear_rgb(other))
            )
            assert distance > OKABE_ITO, (name, one, other)


@pytest.mark.parametrize("dark", [False, True])
def test_hues_have_the_contrast_that_wcag_requires(dark: bool) -> None:
    background = DARK[PAPER] if dark else PAPER
    for hue in (INK, *HUES):
        assert contrast(DARK[hue] if dark else hue, background) >= 3, hue


def test_shipped_methods_have_different_styles() -> None:
    styles = series_styles({name: name for name in methods.names()})
    assert len({(style.colour, style.marker) for style in styles.values()}) == len(styles)


def test_style_does_not_depend_on_other_methods() -> None:
    everything = series_styles({name: name for name in [*methods.names(), "channel_gain"]})
    for name in everything:
        assert series_styles({name: name})[name] == everything[name]


def test_only_references_have_no_hue() -> None:
    styles = series_styles({name: name for name in methods.names()})
    assert {name for name, style in styles.items() if style.colour == INK} == set(REFERENCES)


def test_labels_of_a_method_share_its_hue() -> None:
    styles = series_styles({"spm": "spm", "spm(iterations=1)": "spm", "spm(guidance=False)": "spm", "lora": "lora"})
    variants = [style for label, style in styles.items() if label.startswith("spm")]
    assert {style.colour for style in variants} == {series_styles({"spm": "spm"})["spm"].colour}
    assert len({style.marker for style in variants}) == 3
    assert styles["spm"] == series_styles({"spm": "spm"})["spm"]


def test_themes_define_the_variables_of_inlined_plots() -> None:
    assert themed(f"fill: {INK}; stroke: {HUES[1]}; stop-color: #abcdef") == (
        "fill: var(--ink); stroke: var(--hue1); stop-color: #abcdef"
    )
    assert set(theme(dark=True)) == set(theme(dark=False)) >= {"--ink", "--hue1"}


def draw(
    collected: Collected, published: tuple[PublishedScore, ...] = (), references: tuple[str, ...] = ("linear",)
) -> dict[str, Plot]:
    compared = compare(collected, "miou", references)
    with mpl.rc_context(RC):
        kinds = plots.sources(collected, match(published, compared, "miou"), compared)
        return {plot.name: plot for kind in kinds for plot in kind}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """Five methods on three backbones and two datasets, and a search."""
    root = tmp_path_factory.mktemp("runs")
    make_runs(root, ["linear", "spm", "full", "lora", "norm"], ["resnet18", "resnet50", "vit"], ["meadow", "town"])
    for method, accuracy in (("linear", 0.6), ("spm", 0.7), ("full", 0.65)):
        make_run(root, make_spec(method, part="dev"), accuracy)
        make_run(root, make_spec(method, head="linear"), accuracy)
    make_search(root)
    return collect(root)


@pytest.fixture(scope="module")
def drawn(grid: Collected) -> dict[str, Plot]:
    return draw(grid)


def test_every_plot_is_drawn(drawn: dict[str, Plot]) -> None:
    assert list(drawn) == [
        "tradeoff-trained-method", "tradeoff-delta-bytes", "tradeoff-peak-memory-bytes", "tradeoff-train-seconds",
        "difference-to-linear", "dev-test", "heads", "rank-stability", "critical-difference", "curves-miou-train",
        "curves-loss", "classes", "search-spm-resnet18-meadow-0a1b2c3d",
    ]  # fmt: skip


def test_every_setting_has_a_panel(drawn: dict[str, Plot]) -> None:
    titles = [axes.get_title("left") for axes in drawn["tradeoff-trained-method"].figure.axes]
    assert titles == [
        "resnet18 · meadow · fpn:64", "resnet18 · meadow · linear", "resnet18 · town · fpn:64",
        "resnet50 · meadow · fpn:64", "resnet50 · town · fpn:64", "vit · meadow · fpn:64", "vit · town · fpn:64",
    ]  # fmt: skip


def test_caption_explains_seeds_and_bars(drawn: dict[str, Plot]) -> None:
    caption = drawn["tradeoff-trained-method"].caption
    assert "2 seeds" in caption and "95 % interval of the mean over seeds" in caption


def test_zero_parameters_are_left_of_the_logarithmic_axis(
    drawn: dict[str, Plot],
) -> None:
    figure = drawn["tradeoff-trained-method"].figure
    axes = figure.axes[0]
    assert axes.get_xlim()[0] < 0 < axes.transData.transform((0, 0.5))[0]
    assert axes.get_xticklabels()[0].get_text() == "0"
    assert "0 left of the break" in figure._supxlabel.get_text()


def test_labels_do_not_overlap(tmp_path: Path) -> None:
    names = ["linear", "spm", "lora", "norm", "bias", "ssf", "adapter", "full"]
    for number, name in enumerate(names):
        make_run(tmp_path, make_spec(name), accuracy=0.75 + 0.002 * number, trained=30_000 + 700 * number)
    figure = draw(collect(tmp_path))["tradeoff-trained-method"].figure
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(names)
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_single_run_has_no_bars_and_no_ranks(tmp_path: Path) -> None:
    make_run(tmp_path, make_spec("spm"))
    drawn = draw(collect(tmp_path))
    assert not {"rank-stability", "critical-difference", "difference-to-linear"} & set(drawn)


def test_absent_class_is_not_zero(tmp_path: Path) -> None:
    matrices = np.zeros((3, 2, 2), np.int64)
    matrices[:, 0, 0] = 50
    make_run(tmp_path, make_spec("spm"), matrices=matrices, classes=["road", "sky"])
    axes = draw(collect(tmp_path))["classes"].figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["absent"]
    (points,) = (line for line in axes.lines if len(line.get_ydata()) == 2)
    assert np.isnan(points.get_xdata()).tolist() == [False, True]


@pytest.mark.parametrize(("head_counted", "where"), [(False, "tradeoff-trained-method"), (True, "tradeoff-trained")])
def test_published_score_is_hollow_and_on_its_own_axis(tmp_path: Path, head_counted: bool, where: str) -> None:
    make_runs(tmp_path, seeds=[0])
    cited = PublishedScore(
        setting="a table", dataset="meadow", backbone="resnet18", head="fpn:64", method="spm", printed="SPM (cited)",
        value=61, trained_millions=0.04, head_counted=head_counted, source="somebody", sure="notes",
    )  # fmt: skip
    drawn = draw(collect(tmp_path), (cited,))
    hollow = [
        (name, line)
        for name, plot in drawn.items()
        for line in plot.figure.axes[0].lines
        if name.startswith("tradeoff") and line.get_markerfacecolor() == "none"
    ]
    ((name, point),) = hollow
    assert name == where
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (40_000, 0.61)


def test_all_verdicts_look_alike_in_the_forest_plot(tmp_path: Path) -> None:
    same = np.tile([[60, 40], [30, 70]], (8, 1, 1))
    better = np.tile([[90, 10], [5, 95]], (8, 1, 1))
    for name, matrices in {"linear": same, "norm": same, "spm": better, "lora": better}.items():
        for seed in (0, 1) if name != "lora" else (0,):
            make_run(tmp_path, make_spec(name, seed=seed), matrices=matrices, classes=["road", "sky"])
    axes = draw(collect(tmp_path))["difference-to-linear"].figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["no significant difference", "no verdict", "better"]
    assert len({(text.get_color(), text.get_fontsize(), text.get_fontweight()) for text in axes.texts}) == 1


def test_names_stay_text(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "$\\frac{", "a\nb\x00"]
    make_run(tmp_path / "runs", make_spec("spm", dataset="$x_{"), classes=names)
    collected = collect(tmp_path / "runs")
    nothing = compare(collected, "miou", [])
    with plots.drawing(collected, match([], nothing, "miou"), nothing, tmp_path / "plots") as wait:
        drawn = wait()
    for saved in drawn:
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(saved.svg).iter()}
        assert "script" not in tags
    assert [path.suffix for path in drawn[0].files] == [".svg"]


def test_no_finished_run_is_no_plot(tmp_path: Path) -> None:
    make_run(tmp_path, make_spec("spm", part="dev"))
    collected = collect(tmp_path)
    nothing = compare(collected, "miou")
    with plots.drawing(collected, match([], nothing, "miou"), nothing, tmp_path) as wait:
        assert wait() == []


def draw_some(root: Path, folder: Path) -> list[Path]:
    """One plot for each kind of code that could depend on chance: moved labels, sets of names, a legend."""
    wanted = ("tradeoff-trained-method", "critical-difference", "curves-loss")
    drawn = draw(collect(root))
    with mpl.rc_context(RC):
        return [path for name in wanted for path in save(drawn[name], folder, list(FORMATS)).files]


@pytest.mark.exhaustive
def test_same_runs_give_same_bytes_in_another_process(tmp_path: Path) -> None:
    make_runs(tmp_path / "runs", ["linear", "spm", "full"], ["a", "b", "c"], seeds=[0], images=4)
    script = "import pathlib, sys, tests.reports.test_plots as t; t.draw_some(*map(pathlib.Path, sys.argv[1:]))"
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "runs"), str(tmp_path / "there")],
        check=True, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONHASHSEED": "1"},
    )  # fmt: skip
    drawn = draw_some(tmp_path / "runs", tmp_path / "here")
    assert len(drawn) == 9
    for path in drawn:
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name
