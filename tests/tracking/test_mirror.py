"""What MLflow shows of a run folder, with a real store: states, metrics, files, and that nothing is sent twice."""

from __future__ import annotations

import math
import signal
import subprocess
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.runs.state import Outcome, RunState
from harness.runs.store import RunStore
from harness.tracking.mirror import Mirror, sync, tracked_store
from harness.tracking.mlflow_store import tracking_uri
from tests.support.made_runs import make_spec
from tests.support.tracked_runs import MadeRun, Mirrored, start, strict, write_trials

# A folder and its MLflow run


def test_running_run_has_its_spec_as_parameters(runs: Path) -> None:
    made = MadeRun(runs)
    made.curve(10, 20)
    assert Mirror(runs, None, strict).update(made.path)
    run = Mirrored(runs).only()
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "spm/tf_efficientnet_lite0/landcover/seed0"
    assert run.data.params["method"] == "spm"
    assert run.data.params["hyperparameters.guidance"] == "true"
    assert run.data.params["budget.crop"] == "[96, 96]"
    assert len(run.data.params["hyperparameters.note"]) == 6000
    assert run.data.metrics["train/loss"] == 1 / 20


def test_done_run_has_its_metrics_and_files(runs: Path) -> None:
    made = MadeRun(runs)
    made.curve(10, 20)
    made.finish()
    Mirror(runs, None, strict).update(made.path, final=True)
    mirrored = Mirrored(runs)
    run = mirrored.only()
    assert run.info.status == "FINISHED"
    assert run.data.metrics["miou"] == 0.575
    assert run.data.metrics["parameters.trainable"] == 200
    assert run.data.metrics["inference.ratio"] == 1.1
    assert {name: value for name, value in run.data.metrics.items() if name.startswith("iou/")} == {
        "iou/road_track": 0.9,
        "iou/__": 0.25,
    }
    assert not any("provenance" in name or "spec" in name for name in run.data.metrics)
    assert mirrored.artifacts() == {"result.json", "spec.yaml", "log.txt", "delta.safetensors", "samples"}
    assert mirrored.artifacts("samples") == {"samples/0.png"}
    assert (runs / "mlartifacts").is_dir()


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("failed", "FAILED"),
        ("diverged", "FAILED"),
        ("out_of_memory", "FAILED"),
        ("unsupported", "FAILED"),
        ("interrupted", "KILLED"),
        ("timed_out", "KILLED"),
    ],
)
def test_recorded_end_is_shown_with_its_reason(runs: Path, state: str, status: str) -> None:
    """Also for a run that was never started, such as an unsupported one, or whose process died."""
    tracked_store(runs, None, strict).record(make_spec(), Outcome(RunState(state), "the reason"))
    assert Mirrored(runs).state() == (status, state, "the reason")


def test_undefined_values_leave_gaps_in_the_curve(runs: Path) -> None:
    made = MadeRun(runs)
    made.curve(10)
    made.curve(20, loss=math.nan)
    made.curve(30, loss=math.inf)
    made.end("diverged", "loss is nan at step 20")
    Mirror(runs, None, strict).update(made.path, final=True)
    assert Mirrored(runs).steps("train/loss") == [10]
    assert Mirrored(runs).steps("train/lr") == [10, 20, 30]


def test_half_written_curve_line_is_sent_when_complete(runs: Path) -> None:
    made = MadeRun(runs)
    made.curve(10)
    whole = made.run.curve_path.read_text()
    with made.run.curve_path.open("a") as file:
        file.write('{"step": 20, "loss": 0.0')
    mirror = Mirror(runs, None, strict)
    assert mirror.update(made.path)
    assert Mirrored(runs).steps() == [10]
    made.run.curve_path.write_text(whole)
    made.curve(20)
    assert mirror.update(made.path)
    assert Mirrored(runs).steps() == [10, 20]


# Killed processes

_RUN_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from harness.spec import Spec
from harness.tracking.mirror import tracked_store

runs, spec = Path(sys.argv[1]), Spec.from_yaml(sys.argv[2])
store = tracked_store(runs, None, print)
run = store.folder(spec)
with store.lock(run) as run.lock:
    run.begin(spec, 1)
    run.append_curve({"step": 10, "loss": 0.1})
    run.progress(10)
    print("running", flush=True)
    time.sleep(900)
"""


@pytest.fixture
def killed(runs: Path) -> MadeRun:
    """A run that MLflow shows as running, and whose process was killed."""
    made = MadeRun(runs)
    process = start(_RUN_UNTIL_KILLED, runs, made.spec.to_yaml(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    assert Mirrored(runs).state()[0] == "RUNNING"
    assert sync(runs).current == 1, "a live run stays as it is"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return made


def test_sync_ends_a_killed_run_until_it_is_resumed(runs: Path, killed: MadeRun) -> None:
    assert sync(runs).mirrored == 1
    assert Mirrored(runs).state() == ("KILLED", "interrupted", "its process ended after step 10")
    killed.begin()
    Mirror(runs, None, strict).update(killed.path)
    assert Mirrored(runs).state() == ("RUNNING", "running", "")


def test_next_run_of_the_store_ends_a_killed_run(runs: Path, killed: MadeRun) -> None:
    Mirror(runs, None, strict).update(MadeRun(runs, seed=1).path)
    statuses = {run.data.params["seed"]: run.info.status for run in Mirrored(runs).runs()}
    assert statuses == {"0": "KILLED", "1": "RUNNING"}


# Repetition


def test_second_update_changes_nothing(runs: Path) -> None:
    made = MadeRun(runs)
    made.curve(10, 20)
    made.finish()
    for _ in range(2):
        assert Mirror(runs, None, strict).update(made.path, final=True)
    assert Mirrored(runs).steps() == [10, 20]
    assert Mirrored(runs).steps("miou") == [20]
    assert sync(runs).current == 1


def test_interrupted_update_is_repeated_without_duplicates(runs: Path) -> None:
    made = MadeRun(runs)
    made.curve(10, 20)
    made.finish()
    Mirror(runs, None, strict).update(made.path, final=True)
    mirrored = Mirrored(runs)
    mirrored.client.delete_tag(mirrored.only().info.run_id, "harness.mirrored")
    assert sync(runs).mirrored == 1
    assert (mirrored.steps(), mirrored.steps("miou")) == ([10, 20], [20])


def test_more_points_than_one_request_holds_all_arrive(runs: Path) -> None:
    made = MadeRun(runs)
    steps = list(range(1, 302))
    made.curve(*steps)
    Mirror(runs, None, strict).update(made.path)
    assert Mirrored(runs).steps() == steps


def test_resumed_run_sends_no_point_of_the_curve_twice(runs: Path) -> None:
    made = MadeRun(runs)
    made.curve(10, 20, 30)
    Mirror(runs, None, strict).update(made.path)
    made.end("interrupted", "Ctrl-C")
    Mirror(runs, None, strict).update(made.path, final=True)
    made.run.cut_curve(20)
    made.begin()
    resumed = Mirror(runs, None, strict)
    resumed.update(made.path)
    assert Mirrored(runs).only().info.status == "RUNNING"
    made.curve(30, images_per_second=20.0)
    made.curve(40)
    resumed.update(made.path)
    assert Mirrored(runs).steps() == [10, 20, 30, 40]


def test_new_attempt_ends_the_previous_mlflow_run(runs: Path) -> None:
    made = MadeRun(runs)
    mirror = Mirror(runs, None, strict)
    mirror.update(made.path)
    made.begin(attempt=2)
    mirror.update(made.path)
    found = {run.data.tags["harness.attempt"]: run.info.status for run in Mirrored(runs).runs()}
    assert found == {"1": "KILLED", "2": "RUNNING"}


def test_duplicate_mlflow_run_is_removed(runs: Path) -> None:
    made = MadeRun(runs)
    made.curve(10)
    Mirror(runs, None, strict).update(made.path)
    mirrored = Mirrored(runs)
    first = mirrored.only()
    tags = {key: first.data.tags[key] for key in ("harness.fingerprint", "harness.attempt")}
    mirrored.client.create_run(first.info.experiment_id, first.info.start_time + 1, tags)
    made.finish()
    sync(runs)
    assert mirrored.only().info.run_id == first.info.run_id


# Many folders


def test_sync_names_unreadable_folders(runs: Path) -> None:
    for seed in range(3):
        MadeRun(runs, seed).finish()
    broken, damaged = MadeRun(runs, 3), MadeRun(runs, 4)
    broken.run.spec_path.write_text("method: spm\n")
    damaged.run.result_path.write_text('{"status": "do')
    empty = runs / ("0" * 16)
    empty.mkdir()
    (runs / "studies").mkdir()
    write_trials(runs / "searches" / "bad", [{"number": 0}])
    summary = sync(runs)
    assert (summary.mirrored, summary.current) == (3, 0)
    assert set(summary.failed) == {broken.path.name, damaged.path.name, empty.name, "bad"}
    assert summary.failed[broken.path.name] == "spec.yaml: hyperparameters: is missing"
    assert summary.failed[damaged.path.name].startswith("result.json: ")
    assert summary.failed[empty.name] == "spec.yaml: No such file or directory"
    assert summary.failed["bad"] == "trials.json: KeyError: 'state'"
    assert sync(runs).current == 3


@pytest.mark.parametrize(("objective", "best"), [("miou", 0.7), ("flops", 0.3)])
def test_best_value_of_a_search_follows_its_direction(runs: Path, objective: str, best: float) -> None:
    trials = [
        {"state": "complete", "values": [value], "steps": 5, "fingerprint": f"{number:016x}"}
        for number, value in enumerate((0.5, 0.7, 0.3))
    ]
    write_trials(runs / "searches" / "made", trials, objectives=[objective])
    assert Mirror(runs, None, strict).update_search(runs / "searches" / "made")
    assert Mirrored(runs).only().data.metrics == {"trials/complete": 3, "steps": 15, f"best/{objective}": best}


def start_search(runs: Path, unfinished: MadeRun) -> Path:
    """The folder of a search of one complete and one unfinished trial, which MLflow shows as running."""
    trials = [
        {"state": "complete", "values": [0.5], "steps": 5, "fingerprint": f"{1:016x}"},
        {"state": "running", "values": None, "steps": 0, "fingerprint": unfinished.run.fingerprint},
    ]
    folder = runs / "searches" / "made"
    write_trials(folder, trials)
    assert Mirror(runs, None, strict).update_search(folder)
    assert state_of_search(runs) == "RUNNING"
    return folder


def state_of_search(runs: Path) -> str:
    (search,) = (run for run in Mirrored(runs).runs() if "harness.search" in run.data.tags)
    return search.info.status


def test_killed_search_is_ended_by_sync(runs: Path) -> None:
    unfinished = MadeRun(runs)
    folder = start_search(runs, unfinished)
    with RunStore(runs).lock(unfinished.run):  # a process still executes a trial
        assert sync(runs).failed == {}
        assert state_of_search(runs) == "RUNNING"
    assert sync(runs).failed == {}
    assert state_of_search(runs) == "KILLED"
    Mirror(runs, None, strict).update_search(folder)
    assert state_of_search(runs) == "RUNNING"  # resumed


def test_killed_search_is_ended_by_the_next_command(runs: Path) -> None:
    unfinished = MadeRun(runs)
    start_search(runs, unfinished)
    other = MadeRun(runs, seed=1)
    Mirror(runs, None, strict).update(other.path)
    assert state_of_search(runs) == "KILLED"


def test_stopped_search_is_ended_by_its_process(runs: Path) -> None:
    """Its jobs still hold their locks when it says so."""
    unfinished = MadeRun(runs)
    folder = start_search(runs, unfinished)
    with RunStore(runs).lock(unfinished.run):
        Mirror(runs, None, strict).update_search(folder, final=True, stopped=[unfinished.run.fingerprint])
    assert state_of_search(runs) == "KILLED"


def test_unreadable_folder_is_a_warning(runs: Path) -> None:
    made = MadeRun(runs)
    made.run.status_path.write_text("{")
    warnings: list[str] = []
    assert not Mirror(runs, None, warnings.append).update(made.path)
    assert len(warnings) == 1 and "status.json" in warnings[0]


# Where


def test_off_writes_nothing(fresh: Path) -> None:
    made = MadeRun(fresh)
    assert not Mirror(fresh, "off", strict).update(made.path, final=True)
    assert list(fresh.iterdir()) == [made.path]
    with pytest.raises(UserError, match="--tracking off"):
        sync(fresh, "off")


def test_folder_that_a_url_would_cut_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runs .*a\?b: its path has a question mark"):
        tracking_uri(tmp_path / "a?b", None)
    assert tracking_uri(tmp_path / "a?b", "off") is None


def test_links_are_not_followed(runs: Path, tmp_path: Path) -> None:
    made = MadeRun(runs)
    made.finish()
    secret = tmp_path / "secret"
    secret.write_text("key")
    made.run.log_path.unlink(missing_ok=True)
    made.run.log_path.symlink_to(secret)
    Mirror(runs, None, strict).update(made.path, final=True)
    assert "log.txt" not in {path.name for path in (runs / "mlartifacts").rglob("*")}


def test_spec_of_another_run_is_named(runs: Path) -> None:
    made = MadeRun(runs)
    made.run.spec_path.write_text(make_spec(seed=77).to_yaml())
    assert "spec.yaml: is that of run" in sync(runs).failed[made.path.name]


def test_flag_beats_environment_beats_local_store(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(runs, None) == f"sqlite:///{runs}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(runs, None) == "http://environment"
    assert tracking_uri(runs, "http://argument") == "http://argument"
