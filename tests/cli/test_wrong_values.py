"""A value that is wrong is one line, before anything is trained or written."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.in_process import refusal, runs_in
from tests.support.tiny_cell import make_budget, run_arguments

WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "method": (("--method", "spn"), r"--method spn: no such method; did you mean spm\?$"),
    "method like no other": (("--method", "zzz"), r"zzz: no such method; known: .* with --plugin FILE\)$"),
    "backbone": (("--backbone", "resnet110"), r"--backbone resnet110: unknown; did you mean .*resnet101"),
    "backbone of no family": (
        ("--backbone", "densenet121"),
        r"--backbone densenet121: .* its family is not supported; .*\(families: ",
    ),
    "tag": (("--backbone", "resnet50.a1_in2k"), r"no such pre-training tag; did you mean .*resnet50.a1_in1k"),
    "head": (("--head", "upper"), r"--head upper: no such head; did you mean uper\?$"),
    "head's width": (("--head", "fpn:wide"), r"--head fpn:wide: invalid width 'wide'; use a number of channels"),
    "head's zero width": (("--head", "fpn:0"), r"--head fpn:0: invalid width '0'"),
    "head's huge width": (("--head", "fpn:8193"), r"--head fpn:8193: invalid width '8193'"),
    "width of a head that has none": (("--head", "linear:8"), r"--head linear:8: takes no width"),
    "head of a ViT on a CNN": (("--head", "setr_pup"), r"--head setr_pup: is for a ViT .* use fpn or uper$"),
    "dataset": (("--dataset", "landcove"), r"--dataset landcove: no such dataset; did you mean landcover\?"),
    "dataset that is not there": (("--dataset", "ade20k"), r"--dataset ade20k: not found under .*; set --data or HARN"),
    "dataset's file": (("--dataset", "none.yaml"), r"--dataset none.yaml: no such file: none.yaml$"),
    "dataset's folder": (("--dataset", "no/where"), r"--dataset no/where: no such file: no/where/dataset.yaml$"),
    "budget": (("--budget", "dem"), r"--budget dem: no such budget; did you mean demo\? \(or name a .yaml file\)$"),
    "budget's file": (("--budget", "none.yaml"), r"--budget none.yaml: No such file"),
    "no such hyperparameter": (("--set", "hiden=3"), r"--set hiden: no such hyperparameter of method spm; did you"),
    "hyperparameter out of range": (("--set", "hidden=0"), r"hidden=0: input should be greater than or equal to 1$"),
    "hyperparameter of the wrong type": (("--set", "hidden=3.5"), r"hidden=3.5: expected an integer"),
    "hyperparameter that is no flag": (("--set", "guidance=perhaps"), r"guidance=perhaps: expected true or false"),
    "hyperparameter that is not a number": (("--set", "lr=nan"), r"lr=nan: input should be "),
    "hyperparameter without a value": (("--set", "lr="), r"lr='': expected a number"),
    "hyperparameter twice": (("--set", "lr=1", "--set", "lr=2"), r"--set lr=2: lr is set twice$"),
    "no key and value": (("--set", "lr"), r"--set lr: expected KEY=VALUE$"),
    "no key": (("--set", "=3"), r"--set =3: expected KEY=VALUE$"),
    "device": (("--device", "tpu"), r"--device tpu: use auto, cpu, cuda or cuda:N$"),
    "device with a number that has none": (("--device", "cpu:1"), r"--device cpu:1: use auto, cpu, cuda or cuda:N$"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_value_is_one_line_and_leaves_no_files(
    case: str, colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, complaint = WRONG[case]
    line = refusal(*run_arguments(colours, tiny, tmp_path / "runs", *arguments))
    assert re.search(complaint, line), line
    assert runs_in(tmp_path / "runs") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_missing_gpu_is_refused(device: str, colours: Path, tiny: Path, tmp_path: Path) -> None:
    line = refusal(*run_arguments(colours, tiny, tmp_path / "runs", "--device", device))
    assert line.startswith(f"--device {device}: no CUDA device is available; use cpu")
    assert runs_in(tmp_path / "runs") == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated image": (lambda d: truncate(d / "images/train/3.png"), r"images/train/3.png: image file is truncated$"),
    "label out of range": (
        lambda d: Image.fromarray(np.full((64, 64), 7, np.uint8)).save(d / "masks/test/1.png"),
        r"masks/test/1.png: label 7 at \(0, 0\) but 3 classes \(0\.\.2\) and 255 = ignore; .* in 1 of 13 masks$",
    ),
    "mask missing": (lambda d: (d / "masks/train/2.png").unlink(), r"images/train/2.png: no mask .*masks/train/2.png"),
    "no description": (
        lambda d: (d / "dataset.yaml").unlink(),
        r"holds no dataset.yaml; `harness new-dataset broken` writes",
    ),
    "one class": (lambda d: (d / "dataset.yaml").write_text("classes: [all]"), r"dataset.yaml: classes: \['all'\]"),
    "no test part": (lambda d: shutil.rmtree(d / "images/test"), r"images/val: no such folder; the test split is not"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_dataset_names_the_file(
    case: str, colours: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, complaint = BROKEN[case]
    shutil.copytree(colours, tmp_path / "broken")
    change(tmp_path / "broken")
    monkeypatch.chdir(tmp_path)
    line = refusal(*run_arguments(Path("broken"), tiny, tmp_path / "runs"))
    assert line.startswith(("--dataset broken", "broken/dataset.yaml: "))
    assert re.search(complaint, line), line
    assert runs_in(tmp_path / "runs") == []


@pytest.mark.parametrize(("head", "crop"), [("fpn:16", 32), ("uper:16", 64)])
def test_budget_with_too_small_batches_for_the_head_is_refused(
    head: str, crop: int, colours: Path, tmp_path: Path
) -> None:
    budget = make_budget(tmp_path / "narrow.yaml", batch_size=2, accumulate=2, crop=[crop, crop])
    line = refusal(*run_arguments(colours, budget, tmp_path / "runs", "--head", head))
    assert line.startswith(f"--budget narrow: the batch norms of head {head} see one value per channel")
    assert runs_in(tmp_path / "runs") == []


def test_windows_larger_than_the_images_are_refused(colours: Path, tmp_path: Path) -> None:
    budget = make_budget(tmp_path / "wide.yaml", crop=[64, 96], evaluation="slide", stride=[32, 32])
    line = refusal(*run_arguments(colours, budget, tmp_path / "runs"))
    assert line.startswith("--budget wide: the windows of `evaluation: slide`, [64, 96], are larger than the images of")
    assert runs_in(tmp_path / "runs") == []


def test_dev_part_of_one_group_is_refused(colours: Path, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "one")
    with (tmp_path / "one" / "dataset.yaml").open("a") as description:
        description.write("group: ^()")
    line = refusal(*run_arguments(tmp_path / "one", tiny, tmp_path / "runs", "--part", "dev"))
    assert line.startswith(f"{tmp_path}/one/dataset.yaml: dataset: one: dev cannot be held out of train, which is one")
    assert runs_in(tmp_path / "runs") == []


def runs_that_cannot_be(tmp_path: Path) -> dict[str, tuple[Path | str, str]]:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    return {
        "file": (tmp_path / "file", "Not a directory"),
        "below a file": (tmp_path / "file" / "runs", "Not a directory"),
        "loop of links": (tmp_path / "loop", "Too many levels of symbolic links"),
        "broken link": (tmp_path / "broken", f"{tmp_path / 'broken'} is a broken link"),
    }


@pytest.mark.parametrize("case", ["file", "below a file", "loop of links", "broken link"])
@pytest.mark.parametrize("command", ["run", "compare demo", "search", "list runs", "predict a b", "export a", "report"])
def test_bad_runs_folder_is_refused_by_every_command(command: str, case: str, tmp_path: Path) -> None:
    path, reason = runs_that_cannot_be(tmp_path)[case]
    assert refusal(*command.split(), "--runs", path) == f"--runs {path}: {reason}; choose another folder"


@pytest.mark.parametrize("arguments", [("run", "--runs", ""), ("report", "--out", ""), ("run", "--from", "")])
def test_empty_path_is_refused(arguments: tuple[str, ...]) -> None:
    assert refusal(*arguments) == f"{arguments[1]}: it is empty; name a file or folder"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    from harness.cli.folders import check_readable, check_writable
    from harness.errors import UserError

    child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            check_readable("--runs", Path("/usr"))
            for folder in (Path("/usr"), Path("/usr/no/such/runs")):
                with pytest.raises(UserError, match=r"^--runs \S+: Permission denied.*; choose another folder$"):
                    check_writable("--runs", folder)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
