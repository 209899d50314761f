"""The page as a file: its contents, and that it is self-contained and inert."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.runs.samples import save_picture, strip
from reports.analysis.comparison import compare
from reports.read.cited import match
from reports.read.collect import Collected, collect
from reports.render import page
from reports.render.page import samples
from reports.render.page.svg import inlined
from reports.render.plots.saving import SavedPlot
from tests.support.made_runs import end_run, make_older, make_run, make_runs, make_spec

SCRIPT = "<script>alert(1)</script>"


def write(collected: Collected, path: Path, plots: tuple[SavedPlot, ...] = ()) -> str:
    compared = compare(collected, "miou", ["linear"])
    page.write_page(path, collected, plots, match([], compared, "miou"), compared.significance, compared.images)
    return path.read_text(encoding="utf-8")


def data_of(html: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Collected, str]:
    root = tmp_path_factory.mktemp("small")
    make_runs(root / "runs", ["linear", "spm"])
    collected = collect(root / "runs")
    return collected, write(collected, root / "index.html")


def test_page_is_self_contained(small: tuple[Collected, str]) -> None:
    _, html = small
    for tag, attributes in Elements(html).found:
        for name in ("src", "href", "action", "data"):
            target = attributes.get(name) or ""
            assert target == "" or target.startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in html and "url(http" not in html


def test_policy_allows_only_the_own_script(small: tuple[Collected, str]) -> None:
    _, html = small
    (policy,) = (a["content"] for tag, a in Elements(html).found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert [tag for tag, _ in Elements(html).found].count("script") == 2


def test_every_run_has_spec_command_and_provenance(small: tuple[Collected, str]) -> None:
    collected, html = small
    by_id = {run["id"]: run for run in data_of(html)["runs"]}
    assert set(by_id) == set(collected.runs.fingerprint)
    for fingerprint, run in by_id.items():
        assert ["method", run["label"]] in run["spec"] and ["head_lr", "0.003"] in run["spec"]
        folder = collected.root / fingerprint
        assert run["command"] == f"harness run --from {folder}/spec.yaml --runs {collected.root}"
        assert ["device", "a made-up processor"] in run["provenance"]
        assert len(run["curve"]["step"]) == 4 and len(run["iou"]) == 4


def test_samples_belong_to_the_setting_of_their_runs(tmp_path: Path) -> None:
    make_runs(tmp_path / "runs", ["linear", "spm"], ["resnet50", "resnet18"], seeds=[0])
    data = data_of(write(collect(tmp_path / "runs"), tmp_path / "index.html"))
    assert len(data["samples"]) == 4
    for run in data["runs"]:
        assert {data["samples"][sample]["setting"] for sample, _ in run["predictions"]} == {run["setting"]}
        assert data["settings"][run["setting"]].startswith(run["backbone"])


def test_page_of_failures_only(tmp_path: Path) -> None:
    end_run(tmp_path / "runs", make_spec("spm"), "diverged", "the loss was not finite")
    html = write(collect(tmp_path / "runs"), tmp_path / "index.html")
    assert "Diverged" in html and 'href="#samples"' not in html


def test_provenance_of_another_form(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", make_spec("spm"))
    provenance = json.loads(run.result_path.read_text())["provenance"]
    make_older(run, provenance={**provenance, "packages": "none"})
    (entry,) = data_of(write(collect(tmp_path / "runs"), tmp_path / "index.html"))["runs"]
    assert entry["state"] == "done"


@pytest.mark.parametrize("text", [SCRIPT, "--> </script>", "a & b", "\u2028", "日本"])
def test_names_stay_text(tmp_path: Path, text: str) -> None:
    make_run(tmp_path / "runs", make_spec("spm", dataset=text), classes=[text, "sky"])
    end_run(tmp_path / "runs", make_spec("vpt_deep"), "failed", text)
    html = write(collect(tmp_path / "runs"), tmp_path / "index.html")
    assert SCRIPT not in html
    assert data_of(html)["classes"][0][0][0] == text
    assert [tag for tag, _ in Elements(html).found].count("script") == 2


def test_runs_without_a_score_are_listed_with_seeds_and_reason(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", make_spec("linear"))
    for seed in (0, 1):
        end_run(tmp_path / "runs", make_spec("vpt_deep", seed=seed), "unsupported", "no tokens here")
    (tmp_path / "runs" / "0123456789abcdef").mkdir()
    html = write(collect(tmp_path / "runs"), tmp_path / "index.html")
    assert html.count("no tokens here") == 3  # the list; and each run's in the data
    assert "0, 1" in html and "0123456789abcdef" in html


def test_same_runs_give_same_bytes(small: tuple[Collected, str], tmp_path: Path) -> None:
    collected, html = small
    assert write(collect(collected.root), tmp_path / "index.html") == html


def test_inlined_plot_has_own_ids_and_theme_colours(tmp_path: Path) -> None:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="72pt" height="72pt">'
        '<metadata/><style>*{}</style><defs><path id="m" d="M0 0"/></defs><g clip-path="url(#c)">'
        '<use xlink:href="#m" style="fill: #15181c; stroke: #123456"/></g></svg>'
    )
    (tmp_path / "one.svg").write_text(svg, encoding="utf-8")
    html = inlined(SavedPlot("one", "curves", "A <b>", "caption", (tmp_path / "one.svg",)))
    assert 'id="one-m"' in html and 'href="#one-m"' in html and 'clip-path="url(#one-c)"' in html
    assert "fill: var(--ink); stroke: #123456" in html
    assert "metadata" not in html and "<style" not in html and "<b>" not in html


def test_sample_is_cut_into_image_ground_truth_and_prediction(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_spec("spm"), pictures=0)
    parts = [np.full((20, 30, 3), value, np.uint8) for value in (200, 90, 30)]
    truth, prediction = (np.full((20, 30), label, np.uint8) for label in (0, 1))
    save_picture(run.samples_path / "one.png", strip(parts[0], truth, prediction, [(90, 90, 90), (30, 30, 30)]))
    collected = collect(tmp_path)
    gallery = samples.collect_pictures(collected, room=10**6)
    assert gallery.samples == [{"setting": collected.runs.setting[0], "name": "one", "image": 0, "truth": 1}]
    assert gallery.predictions == {run.fingerprint: [(0, 2)]}
    shades = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("L") for uri in gallery.pictures]
    assert [(shade.size, shade.getpixel((15, 10))) for shade in shades] == [
        ((30, 20), 200),
        ((30, 20), 90),
        ((30, 20), 30),
    ]


def test_samples_without_room_are_left_out(tmp_path: Path) -> None:
    make_runs(tmp_path, ["linear", "spm"], seeds=[0, 1], pictures=2)
    collected = collect(tmp_path)
    everything = samples.collect_pictures(collected, room=10**6)
    assert len(everything.predictions) == 4
    half = samples.collect_pictures(collected, room=sum(map(len, everything.pictures)) * 3 // 4)
    seeds = collected.runs.set_index("fingerprint").seed
    assert {seeds[fingerprint] for fingerprint in list(half.predictions)[:2]} == {0}
    assert sum(map(len, half.pictures)) <= sum(map(len, everything.pictures)) * 3 // 4


def test_damaged_sample_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_spec("spm"), pictures=1)
    (run.samples_path / "broken.png").write_bytes(b"\x89PNG no more")
    Image.new("RGB", (31, 8)).save(run.samples_path / "foreign.png")
    collected = collect(tmp_path)
    gallery = samples.collect_pictures(collected, room=10**6)
    assert [sample["name"] for sample in gallery.samples] == ["000"]


def test_images_with_the_largest_gain_and_loss(tmp_path: Path) -> None:
    def matrices(*right: int) -> np.ndarray:
        return np.array([[[hits, 100 - hits], [0, 100]] for hits in right])

    make_run(tmp_path, make_spec("linear"), matrices=matrices(50, 50, 50), classes=["road", "sky"])
    make_run(tmp_path, make_spec("spm"), matrices=matrices(50, 90, 10), classes=["road", "sky"])
    collected = collect(tmp_path)
    ((_, label, found),) = samples.extremes(compare(collected).images, "linear")

    def miou(hits: int) -> float:
        return (hits / 100 + 100 / (200 - hits)) / 2

    assert label == "spm"
    assert found["gains"] == [("001", pytest.approx(miou(90), abs=1e-6), pytest.approx(miou(50), abs=1e-6))]
    assert found["losses"] == [("002", pytest.approx(miou(10), abs=1e-6), pytest.approx(miou(50), abs=1e-6))]
