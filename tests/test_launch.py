"""Stages in processes of their own: order, lock, guard, and nobody left behind.

The worker here is `fake_stages`, which counts instead of training.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from nanolib import config, launch
from nanolib.config import REPOSITORY
from nanolib.rundir import Run, StageDir

LAUNCH = """
import sys
from nanolib import launch
from nanolib.rundir import Run
launch.WORKER = "tests.fake_stages"
look = lambda *_: print("looking", flush=True)
print(launch.stage(sys.argv[1], Run.load(sys.argv[2]), watch=look))
"""
HANG = 600  # seconds: whatever takes longer has hung


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text("model = {depth = 2}\nbase.steps = 10\nmachine.ranks = 1\n")
    monkeypatch.setattr(config, "PROFILES", tmp_path)
    monkeypatch.setattr(launch, "WORKER", "tests.fake_stages")
    monkeypatch.setenv("NANOLIB_RUNS", str(tmp_path / "out"))
    yield Run.open("tiny")
    wait(lambda: not processes(tmp_path))  # no test leaves a process behind


def processes(path, word=""):
    """The live processes whose command line names `path` (and `word`)."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(path) in line and word in line:
            found.append(process)
    return found


def wait(condition):
    deadline = time.monotonic() + HANG
    while not (value := condition()):
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.02)
    return value


def start(run, name, **environment):
    """A launcher in a process of its own, as a notebook's kernel would be."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, name, str(run.path)],
        cwd=REPOSITORY,
        env=os.environ | {"FAKE_SLEEP": "0.05"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def steps(place):
    return [row["step"] for row in place.metrics.rows()]


def starts(place):
    """The step at which each of the stage's workers began."""
    return [int(line) for line in (place.path / "starts").read_text().split()]


def training(place):
    return lambda: len(steps(place)) >= 3


# ---------------------------------------------------------------------------- order


def test_a_stage_runs_what_is_missing_before_it_and_nothing_twice(run):
    seen = []
    result = launch.stage("base", run, watch=lambda place, rows: seen.append(place.name))
    assert result == {"steps": 20, "started": 0}
    assert list(dict.fromkeys(seen)) == ["data", "tokenizer", "shards", "base"]
    assert launch.stage("base", run) == result
    launch.stage("eval", run, of="base")
    for place in (
        *map(run.stage, ("data", "tokenizer", "shards", "base")),
        run.stage("eval", "base"),
    ):
        assert starts(place) == [0]
    assert run.stage("sft").done() is None
    launch.stage("eval", run)  # of the last model
    for name in ("mid", "sft", "grpo"):
        assert run.stage(name).done()
    assert run.stage("eval", "grpo").done() and run.stage("eval", "sft").done() is None


def test_a_report_needs_nothing(run):
    launch.stage("report", run)
    assert sorted(os.listdir(run.path)) == ["manifest.json", "report"]


def test_a_report_is_written_again_when_a_stage_has_finished_since(run):
    place = run.stage("report")
    for finished in ("data", "tokenizer"):
        launch.stage("report", run)
        first = (place.path / "done.json").stat().st_mtime_ns
        launch.stage("report", run)
        assert (place.path / "done.json").stat().st_mtime_ns == first
        launch.stage(finished, run)
        launch.stage("report", run)
        assert (place.path / "done.json").stat().st_mtime_ns > first


def test_a_model_that_skipped_base(run):
    skipped = Run.open("tiny", "skipped", {"base.enabled": False})
    assert launch.prerequisites("sft", skipped) == ["data", "tokenizer", "shards", "mid"]
    assert launch.prerequisites("eval", skipped, "mid") == ["data", "tokenizer", "shards", "mid"]
    with pytest.raises(ValueError, match=r"no stage base: .*base.enabled false; give --run NAME"):
        launch.stage("base", skipped)
    with pytest.raises(ValueError, match=r"no model 'base'; it has mid, sft, grpo"):
        launch.stage("eval", skipped, of="base")


def test_stages_that_are_not(run):
    with pytest.raises(ValueError, match=r"no stage 'pretrain'; there are data, .*report"):
        launch.stage("pretrain", run)
    with pytest.raises(ValueError, match="only eval takes `of`"):
        launch.stage("sft", run, of="base")
    with pytest.raises(ValueError, match="no model 'shards'"):
        launch.stage("eval", run, of="shards")


def test_watching_sees_the_rows_grow(run, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "0.1")
    lengths = []
    launch.stage("report", run, watch=lambda place, rows: lengths.append(len(rows)))
    assert lengths == sorted(lengths) and 1 < len(lengths) < 22 and lengths[-1] == 20
    lengths.clear()
    launch.stage("report", run, watch=lambda place, rows: lengths.append(len(rows)))
    assert lengths == [20]  # a finished stage shows its curve once


def test_following_ends_with_what_was_written_last(tmp_path):
    stage, seen = StageDir("base", tmp_path), []
    follower = launch.Follower([stage], lambda stage, rows: seen.append(len(rows)))

    def working() -> bool:
        """Writes its last row as it ends; nothing new comes in between."""
        stage.metrics.append(step=len(seen), kind="train")
        return len(seen) < 2

    follower.follow(working)
    assert seen == [1, 2, 3]


def test_a_stage_silent_for_longer_than_its_pace_explains_is_called_out(run, monkeypatch):
    """By a last row of kind "silent", each minute; not while it keeps its pace, nor if it stands."""
    place, now, told = run.stage("base"), 1e9, []
    follower = launch.Follower([place], lambda _, rows: told.append([r["kind"] for r in rows]))
    monkeypatch.setattr(time, "time", lambda: now)

    def look(at: float, **row: object) -> list[list[str]]:
        nonlocal now
        now = 1e9 + at
        if row:
            place.metrics.append(step=1, **row)
            os.utime(place.metrics.path, (now, now))
        told.clear()
        follower.look()
        return list(told)

    with launch.locked(place.log):
        assert look(0) == []  # nothing to tell of
        assert look(10, kind="train", seconds=2.0) == [["train"]]
        assert look(60) == [] and look(75) == [["train", "silent"]]
        assert look(100) == [] and look(140) == [["train", "silent"]]
        assert look(160, kind="eval") == [["train", "eval"]]  # it was an evaluation of 150 s
        assert look(160 + 299) == [] and look(160 + 301) == [["train", "eval", "silent"]]
        assert look(500, kind="train", seconds=900.0)[-1][-1] == "train"
        assert look(500 + 1799) == [] and look(500 + 1801)[0][-1] == "silent"
    assert look(9999)[0][-1] == "train" and look(99999) == []  # nobody works on it any more


def test_a_stage_that_never_says_anything_is_called_out(run, monkeypatch):
    place, told = run.stage("base"), []
    follower = launch.Follower([place], lambda _, rows: told.append(rows))
    with launch.locked(place.log):
        (place.path / "attempts.jsonl").write_text("")
        began = (place.path / "attempts.jsonl").stat().st_mtime
        monkeypatch.setattr(time, "time", lambda: began + 61)
        follower.look()
    assert told == [[{"kind": "silent", "seconds": 61}]]


def test_threads_are_pinned_to_a_share_of_the_cores(run, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    launch.stage("data", run)
    assert run.stage("data").done()["machine"] == {"ranks": 1, "threads": 6, "omp": 6}
    two = Run.load(machine={"machine.ranks": 2})
    command = launch._command(two, two.stage("base"), 2)
    assert command["env"]["OMP_NUM_THREADS"] == "3"


def test_gpus_are_counted_without_torch(run, monkeypatch, tmp_path):
    many = Run.load(machine={"machine.ranks": None})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5")
    assert launch._ranks(many) == 3 and launch._ranks(run) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch._ranks(many) == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g'\necho 'GPU 1: A'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch._ranks(many) == 2


# ---------------------------------------------------------------------------- failures


def test_a_failing_worker_shows_the_end_of_its_log(run, monkeypatch):
    monkeypatch.setenv("FAKE", "base:crash")
    with pytest.raises(
        launch.WorkerError, match=r"(?s)base did not finish \(exit code 1\).*broke here"
    ):
        launch.stage("base", run)
    assert run.stage("shards").done() and run.stage("base").done() is None
    monkeypatch.setenv("FAKE", "base:die")
    with pytest.raises(launch.WorkerError, match="killed by SIGKILL") as caught:
        launch.stage("base", run)
    assert "broke here" not in str(caught.value)  # that was the attempt before
    monkeypatch.setenv("FAKE", "ok")
    assert launch.stage("base", run)["steps"] == 20


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_users_mistake_arrives_as_one(run, monkeypatch, ranks):
    monkeypatch.setenv("FAKE", "base:mistake")
    with pytest.raises(ValueError, match=r"^depth must be at least 1, got 0$"):
        launch.stage("base", Run.load(machine={"machine.ranks": ranks}))


def test_an_error_while_watching_stops_the_worker(run, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "0.05")

    def watch(place, rows):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        launch.stage("report", run, watch=watch)
    assert not processes(run.path) and (run.stage("report").path / "saved.json").exists()


# ---------------------------------------------------------------------------- lock


def test_a_second_launcher_follows_the_first(run):
    first, second = start(run, "report"), None
    wait(training(run.stage("report")))
    second = start(run, "report")
    assert "'steps': 20" in first.communicate(timeout=HANG)[0]
    assert "'steps': 20" in second.communicate(timeout=HANG)[0]
    assert starts(run.stage("report")) == [0]


def test_a_look_at_a_lock_is_not_taken_for_work(tmp_path, monkeypatch):
    """`is_running` of another process holds the lock for a moment."""
    other = (tmp_path / "log.txt").open("ab")
    fcntl.flock(other, fcntl.LOCK_EX)
    with launch.locked(tmp_path / "log.txt") as log:
        assert log is None
    monkeypatch.setattr(time, "sleep", lambda seconds: other.close())
    with launch.locked(tmp_path / "log.txt") as log:
        assert log is not None


def test_a_follower_takes_over(run):
    place = run.stage("report")
    first = start(run, "report", FAKE_SLEEP="0.2")
    wait(training(place))
    second = start(run, "report")
    assert second.stdout.readline() == "looking\n"
    first.kill()
    assert "'steps': 20" in second.communicate(timeout=HANG)[0]
    began = starts(place)
    assert len(began) == 2 and began[1] >= 3 and steps(place) == list(range(1, 21))


# ---------------------------------------------------------------------------- guard


def test_interrupting_waits_for_the_save_and_goes_on_from_there(run):
    place = run.stage("report")
    launcher = start(run, "report")
    wait(training(place))
    os.killpg(launcher.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the whole group
    assert "KeyboardInterrupt" in launcher.communicate(timeout=HANG)[1]
    assert not processes(run.path) and not launch.is_running(place)
    saved = json.loads((place.path / "saved.json").read_text())
    assert launch.stage("report", run) == {"steps": 20, "started": saved}
    assert steps(place) == list(range(1, 21))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", ["launcher", "worker", "rank"])
def test_whoever_is_killed_nobody_is_left_and_the_stage_goes_on(run, victim, ranks):
    """`kill -9` of the launcher, of its child (torchrun's agent), of a process that trains."""
    for needed in ("data", "tokenizer", "shards"):
        launch.stage(needed, run)
    run = Run.load(machine={"machine.ranks": ranks})
    place = run.stage("base")
    script = LAUNCH.replace("sys.argv[2])", f"sys.argv[2], {{'machine.ranks': {ranks}}})")
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, "base", str(run.path)],
        cwd=REPOSITORY,
        env=os.environ | {"FAKE_SLEEP": "0.3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait(training(place))
    (child,) = psutil.Process(launcher.pid).children()
    trains = [
        p for p in processes(run.path, "fake_stages") if "distributed.run" not in str(p.cmdline())
    ]
    trains = [p for p in trains if p.pid != launcher.pid]
    assert len(trains) == ranks
    {"launcher": launcher, "worker": child, "rank": trains[-1]}[victim].kill()
    errors = launcher.communicate(timeout=HANG)[1]
    if victim != "launcher":
        assert "did not finish" in errors and not processes(run.path)
    wait(lambda: not processes(run.path) and not launch.is_running(place))
    assert launch.stage("base", run)["steps"] == 20
    assert steps(place) == list(range(1, 21)) and len(starts(place)) == 2


def test_a_worker_that_hangs_is_ended(run):
    launcher = start(run, "report", FAKE="hang")
    log = run.stage("report").log
    wait(lambda: log.exists() and "hanging" in log.read_text())
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=HANG)  # the fake's grace is one second
    assert not processes(run.path)


def test_the_guard_is_off_outside_the_launcher():
    line = "from nanolib.guard import Guard; import time; g = Guard.start(); time.sleep(0.5); print(g.stop_requested)"
    result = subprocess.run(
        [sys.executable, "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.stdout == "False\n"
