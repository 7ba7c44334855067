"""The time of all attempts counts, also of those that were killed."""

import json
import os

import pytest

from nanolib import launch, rundir
from nanolib.rundir import Run
from nanolib.stages import worker
from nanolib.train import Stopped


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / rundir.ATTEMPTS).read_text().splitlines()]


def spent(attempts: int, seconds: float, dollars) -> dict:
    return {"attempts": attempts, "seconds": seconds, "dollars": dollars}


def test_every_attempt_counts_with_its_own_price(tmp_path, monkeypatch):
    clock = iter([100.0, 460.0, 1000.0, 1720.0])
    monkeypatch.setattr(rundir.time, "time", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), rundir.recorded(tmp_path, 3.0):
        raise KeyboardInterrupt
    with rundir.recorded(tmp_path, 5.0):
        assert rundir.spent(tmp_path, now=1010.0)["seconds"] == 370.0
    assert rundir.spent(tmp_path) == spent(2, 1080.0, pytest.approx(0.3 + 1.0))


def test_without_a_price_or_an_attempt_there_are_no_dollars(tmp_path):
    assert rundir.spent(tmp_path) == spent(0, 0.0, None)
    with rundir.recorded(tmp_path, None):
        pass
    assert rundir.spent(tmp_path)["dollars"] is None


def test_a_killed_attempt_ends_at_the_last_change(tmp_path):
    """Its recorder never wrote the end; what is written later does not make it longer."""
    (tmp_path / rundir.ATTEMPTS).write_text(
        '{"started": 100.0, "dollars_per_hour": 36.0, "ended": null}\n{"started": 1'
    )
    (tmp_path / "checkpoints").mkdir()
    for name, changed in (("metrics.jsonl", 130), ("checkpoints/x", 150), ("report.md", 999)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (changed, changed))
    assert rundir.spent(tmp_path) == spent(1, 50.0, pytest.approx(0.5))
    with rundir.recorded(tmp_path, None):
        (tmp_path / "metrics.jsonl").touch()
    first, second = {row["started"]: row for row in rows(tmp_path)}.values()
    assert (first["ended"], first["dollars_per_hour"]) == (150.0, 36.0)
    assert second["ended"] >= second["started"] > 1e9


def test_the_launcher_records_an_attempt_that_dies(monkeypatch):
    run = Run.open("smoke", "twice", {"machine.dollars_per_hour": 3.0})
    monkeypatch.setattr(launch, "WORKER", "tests.fake_stages")
    folder = run.stage("data").path
    monkeypatch.setenv("FAKE", "die")
    with pytest.raises(launch.WorkerError):
        launch.stage("data", run)
    killed = rundir.spent(folder)
    assert killed["attempts"] == 1 and killed["seconds"] > 0
    monkeypatch.setenv("FAKE", "ok")
    launch.stage("data", run)
    both = rundir.spent(folder)
    assert both["attempts"] == 2 and both["seconds"] > killed["seconds"]
    assert all(row["dollars_per_hour"] == 3.0 for row in rows(folder))


@pytest.mark.parametrize("launched", [False, True])
def test_the_done_record_counts_all_attempts(launched, monkeypatch):
    """A stage stopped in its first attempt took both; the launcher or the worker says how long."""
    run = Run.open("smoke", "stopped", {"machine.dollars_per_hour": 3.0})
    stage = run.stage("report")
    stage.path.mkdir()
    if launched:
        (stage.path / rundir.ATTEMPTS).write_text(
            '{"started": 100.0, "dollars_per_hour": 3.0, "ended": 1300.0}\n'
            '{"started": 2000.0, "dollars_per_hour": 3.0, "ended": null}\n'
        )
        monkeypatch.setenv("NANOLIB_GUARD", "1")
        monkeypatch.setattr(worker.Guard, "start", worker.Guard)
    else:

        def stopped(context):
            raise Stopped

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setitem(worker.WORK, "report", stopped)
            worker.work("report", run)
    monkeypatch.setattr(worker.time, "time", lambda: 5600.0)
    worker.work("report", run)
    record = stage.done()
    assert record is not None and record["attempts"] == 2
    if launched:
        assert record["seconds"] == 1200 + 3600
        assert record["dollars"] == pytest.approx(4.0)
