"""Storages of a search: shared by several workers, away for a while, away for good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.runs.state import Outcome, RunState
from tests.support import postgres
from tests.support.postgres import Postgres
from tests.support.searching import Place, drive, execute_trial, start, work


@pytest.fixture
def place(tmp_path: Path, colours: Path, tiny: Path) -> Place:
    return Place(tmp_path / "runs", colours, tiny)


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    if reason := postgres.missing():
        pytest.skip(reason)
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def shared(request: pytest.FixtureRequest, place: Place, tmp_path: Path) -> Place:
    """A run store whose searches use each kind of storage in turn."""
    if request.param == "postgresql":
        return replace(place, storage=request.getfixturevalue("server").create_database())
    return replace(place, storage=f"journal:{tmp_path / 'search.log'}" if request.param == "journal" else None)


def test_four_processes_share_a_search(shared: Place) -> None:
    trials = 10
    workers = [start(work, shared, trials, 0.05, {}) for _ in range(4)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    with shared.open(trials) as search:
        assert [(trial.number, trial.state) for trial in search.trials] == [(n, "complete") for n in range(trials)]
        assert sorted(shared.executed) == sorted(trial.fingerprint for trial in search.trials)
        assert search.folder.trials() == search.trials


def test_server_outage_costs_no_trial(place: Place, server: Postgres) -> None:
    place = replace(place, storage=server.create_database())
    with place.open(3) as search:
        job = search.next()
        assert job is not None
        server.stop()
        try:
            execute_trial(place, job)
            search.ended(job.fingerprint, Outcome(RunState.DONE))
            assert search.next() is None
            assert search.poll() == []
            assert not search.finished
        finally:
            server.start()
        trials = drive(place, search)
    assert [trial.state for trial in trials] == ["complete"] * 3
    assert len(place.executed) == 3
    (warning,) = place.warnings
    assert warning.startswith("--storage postgresql+psycopg:///db")
    assert "does not answer" in warning


def test_long_server_outage_ends_the_search_with_a_hint(place: Place, server: Postgres) -> None:
    place = replace(place, storage=server.create_database())
    with place.open(1, patience=0) as search:
        server.stop()
        try:
            with pytest.raises(UserError, match="start it and run the command again, which resumes the search"):
                while True:
                    search.poll()
        finally:
            server.start()


def test_error_about_an_unreachable_server_hides_its_password(place: Place) -> None:
    url = "postgresql+psycopg://me:secret@/postgres?host=/nowhere"
    with pytest.raises(UserError, match="cannot be used") as refusal:
        replace(place, storage=url).open(1)
    assert "secret" not in str(refusal.value)
