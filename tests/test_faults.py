"""A run killed in every stage ends with the numbers of one that was left alone.

Real workers in profile smoke, started by chapters that only launch; see `runs.bench.faults`
for the long version over the whole course.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from chain import COMMAND, chapter

from nanolib import launch
from nanolib.config import MODELS, REPOSITORY
from nanolib.rundir import Run, StageDir
from runs.bench import faults

# Each stage, the rows of metrics after which it is struck (0: while it starts), and how.
ROAD = [
    ("data", 0, "command"),
    ("tokenizer", 0, "kernel"),
    ("shards", 1, "ctrl-c"),
    ("base", 9, "worker"),
    ("eval/base", 1, "kernel"),
    ("mid", 5, "command"),
    ("eval/mid", 1, "ctrl-c"),
    ("sft", 7, "ctrl-c"),
    ("eval/sft", 1, "command"),
    ("grpo", 4, "worker"),
    ("eval/grpo", 1, "kernel"),
    ("report", 0, "worker"),
]


@pytest.fixture
def notebooks(tmp_path) -> Path:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    models = [[f'"{model}", this', f'"eval", this, of="{model}"'] for model in MODELS]
    for number, calls in enumerate([['"shards", this'], *models, ['"report", this']]):
        lines = "".join(f"launch.stage({call})\n" for call in calls)
        (folder / f"{number:02}_part.py").write_text(chapter("held_stages", lines))
    return folder


def command(notebooks: Path, folder: Path, held: str = "") -> subprocess.Popen:
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

    worker = faults.wait(find, 600)
    assert worker, f"{place.path} never came to where it is held"
    assert launch.WORKER in faults.command_line(worker) and place.done() is None
    return worker


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """Of a run, none of whose processes outlives the test: one that is stopped would for ever."""
    yield tmp_path / "struck"
    for process in psutil.process_iter():
        if str(tmp_path / "struck") in " ".join(faults.command_line(process)):
            process.kill()


@pytest.mark.slow
def test_struck_in_every_stage_the_numbers_are_the_same(
    notebooks, folder, finished_run, monkeypatch
):
    monkeypatch.setattr(launch, "WORKER", "tests.held_stages")
    finished: dict[Path, bytes] = {}
    for name, rows, kind in ROAD:
        place = StageDir(name.split("/")[0], folder / name)
        process = command(notebooks, folder, f"{name} {rows}")
        worker = held_worker(process, place)
        family = faults.kill(kind, process)
        worker.send_signal(signal.SIGCONT)
        out, errors = process.communicate(timeout=120)
        assert process.returncode != 0 and "Traceback" not in errors
        if kind == "ctrl-c":
            assert "run the same command to go on" in out
        assert faults.wait(lambda f=family: not faults.survivors(f), 30), kind
        now = {path: path.read_bytes() for path in folder.glob("**/done.json")}
        assert finished.items() <= now.items()  # no finished stage ran again
        finished = now
    process = command(notebooks, folder)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    struck = Run.load(str(folder))
    assert list(faults.differences(faults.outcome(finished_run), faults.outcome(struck))) == []
    assert not [p for p in psutil.process_iter() if str(folder) in " ".join(faults.command_line(p))]


def test_differences_are_found():
    mine = {"sft": {"rows": [{"loss": 1.0}, {"loss": 2.0}], "result": None}}
    theirs = {"sft": {"rows": [{"loss": 1.0}, {"loss": 2.5}], "result": None}, "base": {}}
    assert list(faults.differences(mine, mine)) == []
    assert list(faults.differences(mine, theirs)) == [
        "base: None != {}",
        "sft/rows/1/loss: 2.0 != 2.5",
    ]
