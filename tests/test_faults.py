"""A run killed in every stage ends with the numbers of one that was left alone.

Real workers in profile smoke; `runs.bench.faults` is the long version, over the whole course.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import held_stages
import psutil
import pytest
from chain import COMMAND, chapter

from nanolib import launch
from nanolib.config import REPOSITORY
from nanolib.rundir import Run, StageDir
from nanolib.stages import worker
from runs.bench import faults

# Each stage, the rows of metrics after which it is struck (0: while it starts), and how: killed,
# or told to stop because its launcher is gone.
ROAD = [
    ("data", 0, "SIGKILL"),
    ("tokenizer", 0, "SIGKILL"),
    ("shards", 1, "stop"),
    ("base", 9, "SIGKILL"),
    ("base", 14, "stop"),
    ("eval/base", 1, "SIGKILL"),
    ("mid", 5, "SIGKILL"),
    ("eval/mid", 1, "stop"),
    ("sft", 7, "stop"),
    ("eval/sft", 1, "SIGKILL"),
    ("grpo", 4, "SIGKILL"),
    ("grpo", 6, "stop"),
    ("eval/grpo", 1, "SIGKILL"),
    ("report", 0, "SIGKILL"),
]
EXIT_CODES = {"SIGKILL": -signal.SIGKILL, "stop": worker.STOPPED, "": 0}


@pytest.fixture(scope="module")
def work():
    """Runs a stage of a run in a process of its own, forked from one that has imported all."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["nanolib.stages.worker", "held_stages"])

    def work(folder: Path, name: str, rows: int = 0, how: str = "") -> None:
        stage, *of = name.split("/")
        words = [stage, str(folder), *(["--of", *of] if of else [])]
        held = f"{name} {rows} {how}" if how else "none 0 none"
        process = fork.Process(target=held_stages.start_here, args=(words, held))
        process.start()
        process.join(600)
        assert process.exitcode == EXIT_CODES[how], (name, rows, how)

    return work


@pytest.mark.slow
def test_struck_in_every_stage_the_numbers_are_the_same(work, finished_run, tmp_path):
    struck = Run.open("smoke", str(tmp_path / "struck"))
    finished: dict[Path, bytes] = {}
    for number, (name, rows, how) in enumerate(ROAD):
        place = StageDir(name.split("/")[0], struck.path / name)
        work(struck.path, name, rows, how)
        assert place.done() is None
        if name not in [later for later, *_ in ROAD[number + 1 :]]:
            work(struck.path, name)
            assert place.done()
        now = {path: path.read_bytes() for path in struck.path.glob("**/done.json")}
        assert finished.items() <= now.items()  # no finished stage ran again
        finished = now
    assert list(faults.differences(faults.outcome(finished_run), faults.outcome(struck))) == []


# ---------------------------------------------------------------------------- the whole command


@pytest.fixture
def folder(finished_run, tmp_path) -> Iterator[Path]:
    """Of a run ready to train; none of its processes outlives the test: a stopped one would."""
    folder = tmp_path / "struck"
    Run.open("smoke", str(folder))
    for name in ("data", "tokenizer", "shards"):
        shutil.copytree(finished_run.path / name, folder / name)
    yield folder
    for process in processes_of(folder):
        process.kill()


def processes_of(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if str(folder) in " ".join(faults.command_line(p))]


def command(folder: Path, held: str = "none 0 none") -> subprocess.Popen:
    """`nanolib run smoke` over one chapter, which trains base."""
    notebooks = folder.parent / "notebooks"
    notebooks.mkdir(exist_ok=True)
    (notebooks / "00_base.py").write_text(chapter("held_stages", 'launch.stage("base", this)\n'))
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(notebooks), "run", "smoke", "--run", str(folder)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HELD": held},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def held_worker(process: subprocess.Popen, place: StageDir) -> psutil.Process:
    """The stage's worker, once it has stopped itself in the middle of its work."""

    def find():
        assert process.poll() is None, process.communicate()
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() == psutil.STATUS_STOPPED:
                    return child
        return None

    held = faults.wait(find, 600)
    assert held, f"{place.path} never came to where it is held"
    assert launch.WORKER in faults.command_line(held) and place.done() is None
    return held


@pytest.mark.slow
def test_whatever_of_a_command_is_struck_nobody_is_left_and_it_goes_on(
    folder, finished_run, monkeypatch
):
    """Real trainers under the real chain; tests/test_pipeline.py strikes stand-ins oftener."""
    monkeypatch.setattr(launch, "WORKER", "tests.held_stages")
    place = StageDir("base", folder / "base")
    for rows, kind in ((9, "command"), (15, "ctrl-c")):
        process = command(folder, f"base {rows} SIGSTOP")
        held = held_worker(process, place)
        family = faults.kill(kind, process)
        kernel = [p for p in family if p != held]  # it holds the guard's pipe: first it ends
        assert faults.wait(lambda k=kernel: not faults.survivors(k), 300), kind
        held.send_signal(signal.SIGCONT)
        out, errors = process.communicate(timeout=600)
        assert process.returncode != 0 and "Traceback" not in errors
        if kind == "ctrl-c":
            assert "run the same command to go on" in out
        assert faults.wait(lambda f=family: not faults.survivors(f), 300), kind
    process = command(folder)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    undisturbed, struck = (faults.outcome(run) for run in (finished_run, Run.load(str(folder))))
    assert list(faults.differences(undisturbed["base"], struck["base"])) == []
    assert not processes_of(folder)


def test_differences_are_found():
    mine = {"sft": {"rows": [{"loss": 1.0}, {"loss": 2.0}], "result": None}}
    theirs = {"sft": {"rows": [{"loss": 1.0}, {"loss": 2.5}], "result": None}, "base": {}}
    assert list(faults.differences(mine, mine)) == []
    assert list(faults.differences(mine, theirs)) == [
        "base: None != {}",
        "sft/rows/1/loss: 2.0 != 2.5",
    ]
