"""Run folders whose files were changed or damaged: one state or one line, never a traceback and never a wrong score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from harness.errors import UserError
from harness.runs.folder import RunFolder
from harness.runs.metrics import read_confusions, save_confusions
from harness.runs.state import RunState
from harness.runs.store import RunStore
from harness.util.files import digest, write_json
from tests.support.in_process import call
from tests.support.made_runs import end_run, make_run, make_spec

STATUS = {
    "a list as state": '{"state": []}',
    "null as state": '{"state": null}',
    "no known state": '{"state": "asleep"}',
    "a list as reason": '{"state": "failed", "reason": [1]}',
    "text as step": '{"state": "failed", "step": "x"}',
    "a mapping as attempt": '{"state": "failed", "attempt": {}}',
    "a lone surrogate": '{"state": "failed", "reason": "a\\ud800"}',
    "nested deep": '{"state": ' + "[" * 100_000,
    "a list": "[1]",
}


@pytest.mark.parametrize("content", STATUS)
def test_status_of_odd_types_is_damaged(tmp_path: Path, content: str) -> None:
    run = end_run(tmp_path, make_spec(), "failed", "out of luck")
    run.status_path.write_text(STATUS[content])
    assert run.status() is None
    assert RunStore(tmp_path).outcome(run).state is RunState.DAMAGED


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


RESULTS = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "a folder": folder,
    "a loop of links": loop,
    "nested deep": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("how", RESULTS)
def test_damaged_result_is_one_row_and_the_others_are_listed(tmp_path: Path, how: str) -> None:
    damaged, _ = (make_run(tmp_path, make_spec(seed=seed)) for seed in (0, 1))
    RESULTS[how](damaged.result_path)
    listed = call("list", "runs", "--json", "--runs", tmp_path)
    assert listed.code == 0, listed.err
    states = {row["fingerprint"]: row["status"] for row in json.loads(listed.out)}
    assert states.pop(damaged.fingerprint) == "damaged" and list(states.values()) == ["done"]
    table = call("list", "runs", "--runs", tmp_path)
    assert table.code == 0 and len(table.out.splitlines()) == 3


def change_spec(run: RunFolder) -> None:
    """As someone would who also brings the digest up to date."""
    record = json.loads(run.result_path.read_text())
    record["spec"]["seed"] += 1
    del record["digest"]
    write_json(run.result_path, record | {"digest": digest(record)})


def test_fingerprint_is_that_of_the_spec(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_spec())
    change_spec(run)
    with pytest.raises(UserError, match=r"result\.json: its spec was changed: it is that of run"):
        run.read_result()
    run.spec_path.write_text(make_spec(seed=1).to_yaml())
    with pytest.raises(UserError, match=r"its spec\.yaml was changed: it is that of run"):
        run.spec()


def test_damaged_points_of_a_curve_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_spec())
    before = run.curve()
    with run.curve_path.open("ab") as handle:
        handle.write(b'\xff\n[1]\n{"step": "x"}\n{"loss": 1}\n' + b"[" * 100_000 + b"\n")
    assert run.curve() == before
    run.cut_curve(20)
    assert [point["step"] for point in run.curve()] == [10, 20]


def test_terminal_shows_escape_codes_as_text(tmp_path: Path) -> None:
    end_run(tmp_path, make_spec(), "failed", "a\x1b[31mred\nb")
    assert r"failed: a\x1b[31mred\nb" in call("list", "runs", "--runs", tmp_path).out


def test_claim_of_gigabytes_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "confusions.npz"
    zeros = np.zeros(1, np.int32)
    np.savez_compressed(
        path, names=np.array(["a"]), groups=np.array(["a"]), shape=np.array([10**12, 3, 3]),
        image=zeros, label=zeros, predicted=zeros, pixels=zeros,
    )  # fmt: skip
    with pytest.raises(UserError, match="damaged"):
        read_confusions(path, {}, 3)
    save_confusions(path, ["a"], ["a"], np.ones((1, 3, 3), np.int64))
    assert read_confusions(path, {}, 3).matrices.sum() == 9
    with np.load(path) as stored:
        fields = dict(stored)
    np.savez_compressed(path, **fields | {"pixels": np.zeros(10**6, np.int64)})
    with pytest.raises(UserError, match="damaged"):
        read_confusions(path, {}, 3)


def test_name_that_is_not_utf8_is_read_as_text_that_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "confusions.npz"
    save_confusions(path, ["caf\udce9"], ["caf\udce9"], np.ones((1, 3, 3), np.int64))
    assert read_confusions(path, {}, 3).names == [r"caf\udce9"]
