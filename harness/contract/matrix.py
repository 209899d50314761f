"""`harness check`: every check on every method and family, as results, as a table, and as an exit code."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch

from harness.contract.cases import TINY, Case, ContractBroken
from harness.contract.checks import CHECKS, FOUNDATIONS, described, finishes_in_two_processes
from harness.errors import UserError
from harness.method import Method, methods
from harness.models.backbones import families
from harness.models.network import MethodError, UnsupportedMethod
from harness.util.text import describe

TWO_PROCESSES_ON = ("test_resnet", "test_vit")
"""The networks that are checked with two processes: one CNN and one ViT, since the check is slow."""

CheckStatus = Literal["ok", "unsupported", "broken"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check of a method on a backbone. `detail` is the reason if it is not `ok`."""

    check: str
    backbone: str
    status: CheckStatus
    detail: str = ""


def tiny_backbones() -> dict[str, str]:
    """family -> its tiny network, for every family that has one."""
    return {family: TINY[family] for family in families.families() if family in TINY}


def check_method(
    method: str | type[Method], backbones: Iterable[str] | None = None, device: str = "cpu"
) -> list[CheckResult]:
    """Run every check on a method (a class, or a registered name) and each of the backbones.

    `backbones` are timm names; by default one tiny network per family. A backbone that the method does not support has
    one outcome, `unsupported` with the method's reason. If a check in `FOUNDATIONS` fails, the later ones are
    skipped. The check with two processes runs on the CPU alone. Raises `UserError` for a name that is not registered.
    """
    cls = methods.get(method) if isinstance(method, str) else method
    outcomes = [_outcome("described", "", lambda: described(cls))]
    if outcomes[0].status == "broken":
        return outcomes
    for name in tiny_backbones().values() if backbones is None else backbones:
        case = Case(cls, name, device)
        for check in CHECKS:
            if check is finishes_in_two_processes and (name not in TWO_PROCESSES_ON or device != "cpu"):
                continue
            outcomes.append(_outcome(check.__name__, name, partial(check, case)))
            if outcomes[-1].status == "unsupported" or (outcomes[-1].status == "broken" and check in FOUNDATIONS):
                break
    return outcomes


def broken(outcomes: Iterable[CheckResult]) -> list[CheckResult]:
    """The failed checks; empty for a method that fulfils the contract."""
    return [outcome for outcome in outcomes if outcome.status == "broken"]


def _outcome(name: str, backbone: str, check: Callable[[], None]) -> CheckResult:
    name = name.replace("_", " ")
    try:
        with torch.random.fork_rng(devices=[]):
            check()
    except UnsupportedMethod as error:
        return CheckResult(name, backbone, "unsupported", str(error))
    except (ContractBroken, MethodError) as error:
        return CheckResult(name, backbone, "broken", str(error))
    except Exception as error:  # a method may raise anything
        return CheckResult(name, backbone, "broken", f"crashes: {describe(error)}")
    return CheckResult(name, backbone, "ok")


@dataclass(frozen=True)
class MatrixRow:
    """One method on one family. `state` is `passes`, `unsupported`, `broken` or `skipped`."""

    method: str
    family: str
    backbone: str
    state: str
    reason: str
    seconds: float
    checks: list[dict[str, str]]


def check_names(names: Sequence[str], on_row: Callable[[MatrixRow], None] = lambda row: None) -> list[MatrixRow]:
    """A row for every method and family. A method that fails to import is `broken` on all of them."""
    rows = []
    for name in names:
        for family in families.families():
            row = _row(name, family)
            rows.append(row)
            on_row(row)
    return rows


def _row(name: str, family: str) -> MatrixRow:
    started = time.monotonic()
    if family not in TINY:
        return MatrixRow(name, family, "", "skipped", "no tiny network of this family is known", 0.0, [])
    try:
        outcomes = check_method(name, [TINY[family]])
    except UserError as error:
        outcomes = [CheckResult("import", TINY[family], "broken", str(error))]
    found = broken(outcomes)
    unsupported = [outcome for outcome in outcomes if outcome.status == "unsupported"]
    state = "broken" if found else "unsupported" if unsupported else "passes"
    reason = "; ".join(f"{o.check}: {o.detail}" for o in found) or "; ".join(o.detail for o in unsupported)
    seconds = round(time.monotonic() - started, 2)
    return MatrixRow(name, family, TINY[family], state, reason, seconds, [asdict(outcome) for outcome in outcomes])


def run_check(names: Sequence[str], json_: bool = False) -> int:
    """Check the methods on every family and print the matrix, or JSON. Returns 1 if a check failed, else 0.

    Raises `UserError` for a name that is not registered.
    """
    known = methods.names()
    for name in names:
        if name not in known:
            methods.get(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads slow down networks this small
    try:
        rows = check_names(names, on_row=_show)
    finally:
        torch.set_num_threads(threads)
    if json_:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print("\n".join(matrix(rows)))
    return 1 if any(row.state == "broken" for row in rows) else 0


def _show(row: MatrixRow) -> None:
    """Print progress to stderr: one line per method and family."""
    print(f"{row.method} on {row.family}: {row.state} ({row.seconds:.1f} s)", file=sys.stderr, flush=True)


def matrix(rows: Sequence[MatrixRow]) -> list[str]:
    """The lines of the table families × methods, then every reason once, with the families that it applies to."""
    names = list(dict.fromkeys(row.method for row in rows))
    cells = {(row.family, row.method): row.state for row in rows}
    left = max(map(len, ("family", *(row.family for row in rows))))
    widths = [max(len(name), *(len(row.state) for row in rows if row.method == name)) for name in names]
    lines = ["  ".join(["family".ljust(left), *(n.ljust(w) for n, w in zip(names, widths, strict=True))]).rstrip()]
    for family in dict.fromkeys(row.family for row in rows):
        states = [cells[family, name].ljust(width) for name, width in zip(names, widths, strict=True)]
        lines.append("  ".join([family.ljust(left), *states]).rstrip())
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.reason:
            method = "" if row.state == "skipped" else row.method
            listed = reasons.setdefault((row.state, method, row.reason), [])
            listed += [row.family] if row.family not in listed else []
    for state in ("broken", "unsupported", "skipped"):
        for (its_state, name, reason), listed in reasons.items():
            if its_state == state:
                lines.append(f"{state}: {f'{name} on ' if name else ''}{', '.join(listed)}: {reason}")
    return lines
