"""The shipped study `paper`, on stand-ins of its four benchmarks in their true layouts and networks of a few layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from harness.data import mmseg_catalog
from harness.data.mmseg_catalog import entry
from harness.engine import rehearsal
from studies import shipped_studies
from tests.support.in_process import call
from tests.support.tiny_files import labels, picture, save

PAPER = yaml.safe_load(shipped_studies()["paper"].read_text())
SIDE = 64


def make_stand_in(data: Path, name: str) -> None:
    """A few images and masks of random pixels, where mmsegmentation expects the benchmark's."""
    found = entry(name)
    first = 1 if found.reduce_zero_label else 0
    for split, count in (("train", 5), ("test", 2)):
        for source in found.sources(split):
            for number in range(count):
                seed = number if split == "train" else 10 + number
                stem = f"Image_{seed:02}L"
                save(data / found.root / source.images / f"{stem}{found.image_suffix}", picture(seed, SIDE, SIDE))
                mask = labels(seed, len(found.classes), SIDE, SIDE) + first
                save(data / found.root / source.masks / f"{stem}{found.mask_suffix}", mask.astype("uint8"))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Evaluated at the stand-ins' own size: a catalog's scale would enlarge them to that of the real images.

    A rehearsal executes two steps and two images: the first, and one that is timed.
    """
    monkeypatch.setattr(rehearsal, "STEPS", 2)
    monkeypatch.setattr(mmseg_catalog, "entry", lambda name: entry(name).model_copy(update={"scale": (SIDE, SIDE)}))
    for name in PAPER["datasets"]:
        make_stand_in(tmp_path, name)
    return tmp_path


@pytest.mark.parametrize(
    ("backbone", "methods", "datasets", "unsupported"),
    [
        ("test_resnet", ["full", "spm", "adaptformer"], PAPER["datasets"][:1], {"adaptformer"}),
        ("test_vit", ["vpt_deep"], PAPER["datasets"][1:], set()),
    ],
)
def test_cells_of_the_paper_work_at_small_size(
    data: Path, backbone: str, methods: list[str], datasets: list[str], unsupported: set[str]
) -> None:
    assert set(methods) < set(PAPER["methods"])  # the contract's tests have all methods
    study = data / "small.yaml"
    changes = {
        "budget": {"base": PAPER["budget"], "crop": [SIDE, SIDE], "batch_size": 2, "precision": "fp32"},
        "heads": [f"{head}:8" for head in PAPER["heads"]],
        "backbones": [{"backbone": backbone, "weights": "random"}],
        "methods": methods,
        "datasets": datasets,
    }
    study.write_text(yaml.safe_dump(PAPER | changes))
    common = ["--runs", data / "runs", "--data", data, "--device", "cpu", "--workers", 0]
    found = call("compare", study, "--rehearse", "--json", *common)
    rows = json.loads(found.out)
    assert found.code == 0 and not any(row["reason"] for row in rows), found.out
    cells = {(row["label"], row["dataset"]) for row in rows if row["label"] in methods}
    assert cells == {(method, dataset) for method in set(methods) - unsupported for dataset in datasets}
