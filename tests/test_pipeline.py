"""The chain of chapters: skipped, executed again, interrupted, killed.

Chapters here are two small files, and stages count instead of training (`fake_stages`).
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from chain import COMMAND, chapter

from nanolib import config, pipeline, rundir
from nanolib.config import REPOSITORY
from nanolib.rundir import Run
from nanolib.ui import cli
from runs.bench import faults
from runs.bench.faults import survivors

# Ending a kernel takes longer than nbclient's second between two looks at whether it lives: what
# happens now and then on a busy machine happens always.
SLOW_END = """
import asyncio
from jupyter_client import AsyncKernelManager
end = AsyncKernelManager.cleanup_resources
async def slow(self, *given, **named):
    await asyncio.sleep(1.5)
    await end(self, *given, **named)
AsyncKernelManager.cleanup_resources = slow
"""


@pytest.fixture
def notebooks(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "00_first.py").write_text(chapter("fake_stages", 'launch.stage("shards", this)\n'))
    (folder / "01_second.py").write_text(chapter("fake_stages", 'launch.stage("base", this)\n'))
    monkeypatch.setattr(pipeline, "NOTEBOOKS", folder)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return folder


HANG = 600  # seconds: whatever takes longer has hung


def command(
    notebooks: Path, *words: str, script: str = COMMAND, **environment: str
) -> subprocess.Popen:
    """`nanolib …` over our chapters."""
    return subprocess.Popen(
        [sys.executable, "-c", script, str(notebooks), *words],
        env=os.environ | {"FAKE_SLEEP": "base:0.1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def wait(condition):
    value = faults.wait(condition, HANG)
    assert value, "it hangs"
    return value


def steps(run: Run, stage: str) -> list[int]:
    return [row["step"] for row in run.stage(stage).metrics.rows()]


def test_the_chain_and_what_it_skips(notebooks, capfd):
    run = pipeline.run("smoke")
    out = capfd.readouterr().out
    assert run.stage("base").done() and f"{run.path / 'chapters'}" in out
    assert "nanolib chat --run smoke" in out and "base       20/20  loss 0.050" in out
    folder = run.path / "chapters"
    assert "<html" in (folder / "00_first.html").read_text()
    before = (folder / "00_first.ipynb").read_bytes()
    text = (notebooks / "01_second.py").read_text()
    (notebooks / "01_second.py").write_text(text + "print('edited', run)\n")
    pipeline.run("smoke")
    out = capfd.readouterr().out
    assert "00_first: finished before" in out and "01_second: done" in out
    assert (folder / "00_first.ipynb").read_bytes() == before
    assert "edited smoke" in (folder / "01_second.ipynb").read_text()
    (folder / "00_first.ipynb").unlink()
    pipeline.run("smoke")
    assert "00_first: done" in capfd.readouterr().out
    assert rundir.spent(run.path)["attempts"] == 3


def test_overrides_reach_the_chapters(notebooks):
    (notebooks / "01_second.py").unlink()
    (notebooks / "00_first.py").write_text(
        chapter("fake_stages", "assert this.config.recipe.seed == 5\n")
    )
    run = pipeline.run("smoke", None, {"seed": 5, "machine.threads": 1})
    assert run.id.startswith("smoke-")


@pytest.mark.parametrize(
    "cells, found",
    [
        ("# %%\nprofile = 1", "found nothing"),
        ('# %% tags=["parameters"]\nprofile = run = overrides = 1', "found "),
        (
            '# %% tags=["parameters"]\nrun = 1\nprofile = 1\noverrides = 1',
            "found run, profile, overrides",
        ),
        (
            '# %% tags=["parameters"]\nprofile = 1\nrun = 1\noverrides = 1\nextra = 1',
            "found profile, run, overrides, extra",
        ),
    ],
)
def test_a_chapter_without_the_agreed_parameters_is_refused(notebooks, cells, found):
    (notebooks / "00_first.py").write_text(cells)
    with pytest.raises(ValueError, match=f"00_first.py needs one cell tagged .*{found}"):
        pipeline.run("smoke")


# ---------------------------------------------------------------------------- failures


def test_a_failed_lesson_is_passed_by_and_told(notebooks, tmp_path, capfd):
    """Its stages are done: the next chapters run, and the same command executes it once more."""
    executed = tmp_path / "executed"
    lesson = (
        'launch.stage("shards", this)\n'
        f'print("again", file=open({str(executed)!r}, "a"))\n'
        'assert 1 == 2, "not\\nequal"\n'
    )
    (notebooks / "00_first.py").write_text(chapter("fake_stages", lesson))
    Run.open("smoke").stage("sft").path.mkdir()  # interrupted some time ago: not this chapter's
    Run.open("smoke").stage("sft").log.write_text("--- sft\n")
    for attempt in (1, 2):
        with pytest.raises(
            pipeline.ChapterError, match=r"(?m)00_first.ipynb: AssertionError: not$"
        ):
            pipeline.run("smoke")
        out = capfd.readouterr().out
        assert "00_first: its lesson failed (AssertionError: not)" in out
        assert "01_second: " + ("done in" if attempt == 1 else "finished before") in out
        assert "run smoke is finished\n" in out
        assert len(executed.read_text().split()) == attempt
    run = Run.load("smoke")
    assert run.stage("base").done() and "AssertionError" in (
        (run.path / "chapters" / "00_first.html").read_text()
    )
    assert cli.main(["watch"]) == 1
    out, errors = capfd.readouterr()
    assert "run smoke is finished" in out and "00_first.ipynb: AssertionError: not" in errors
    (notebooks / "00_first.py").write_text(chapter("fake_stages", "print('mended')\n"))
    pipeline.run("smoke")
    assert "run smoke is finished\n" in capfd.readouterr().out


def test_a_lesson_that_fails_before_its_stage(notebooks):
    """A later chapter brings up what is missing; a ValueError of a lesson is no user's mistake."""
    (notebooks / "00_first.py").write_text(
        chapter("fake_stages", 'raise ValueError("shapes")\nlaunch.stage("shards", this)\n')
    )
    process = command(notebooks, "run", "smoke", FAKE_SLEEP="0")
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 1 and "00_first.ipynb: ValueError: shapes" in errors
    run = Run.load("smoke")
    assert run.stage("shards").done() and run.stage("base").done()


@pytest.mark.parametrize(
    "name, message",
    [
        ("shards", "depth must be at least 1, got 0"),
        ("mid", "run 'smoke-[^']*' has no stage mid: "),
    ],
)
def test_a_users_mistake_stops_the_chain(notebooks, monkeypatch, capsys, name, message):
    """Found by the worker, or by `launch.stage` before it starts one."""
    monkeypatch.setenv("FAKE", "tokenizer:mistake")
    (notebooks / "00_first.py").write_text(chapter("fake_stages", f'launch.stage("{name}", this)'))
    assert cli.main(["run", "smoke", "--mid.enabled", "false"]) == cli.USERS_MISTAKE
    errors = capsys.readouterr().err
    assert re.search(rf"^error: chapter 00_first \(.*ipynb\): {message}", errors, re.M)
    assert not list(Path(os.environ["NANOLIB_RUNS"]).glob("*/chapters/01_second.ipynb"))


def test_a_watch_that_fails_is_a_failed_lesson(notebooks, monkeypatch, capsys):
    """Its stage is stopped; a later chapter that needs it goes on with it."""
    monkeypatch.setenv("FAKE_SLEEP", "data:0.1")
    call = 'launch.stage("data", this, watch=lambda *_: 1 / 0)'
    (notebooks / "00_first.py").write_text(chapter("fake_stages", call))
    assert cli.main(["run", "smoke"]) == cli.FAILED
    assert "00_first.ipynb: ZeroDivisionError" in capsys.readouterr().err
    assert Run.load("smoke").stage("data").done() and Run.load("smoke").stage("base").done()


def test_a_failing_worker_reaches_the_terminal(notebooks):
    process = command(notebooks, "run", "smoke", FAKE="tokenizer:crash")
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 1 and "something broke here" in errors
    assert "Traceback" not in errors.split("The end of")[0]


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "kernel", "command"])
def test_interrupted_the_same_command_goes_on(notebooks, how):
    """Ctrl-C, a polite kill, `kill -9` of the kernel and of the command."""
    (notebooks / "00_first.py").unlink()
    process = command(notebooks, "run", "smoke", script=SLOW_END + COMMAND)
    runs = Path(os.environ["NANOLIB_RUNS"])
    run = Run.load(str(wait(lambda: next(runs.glob("smoke/manifest.json"), None)).parent))
    wait(lambda: len(steps(run, "base")) >= 3)
    members = family(process.pid)
    assert len(members) == 2
    if how == "kernel":
        next(p for p in members if "ipykernel" in " ".join(p.cmdline())).kill()
    elif how == "command":
        process.kill()
    else:
        process.send_signal(getattr(signal, how))
    out, errors = process.communicate(timeout=HANG)
    if how.startswith("SIG"):
        assert process.returncode == 130 and "run the same command to go on" in out
        assert not survivors(members) and errors == ""
    elif how == "kernel":
        assert process.returncode == 1 and "kernel of chapter 01_second died" in errors
    wait(lambda: not survivors(members))
    shards = (run.stage("shards").path / "done.json").read_bytes()

    process = command(notebooks, "run", "smoke")
    out, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    assert (run.stage("shards").path / "done.json").read_bytes() == shards
    assert run.stage("base").done()["result"]["started"] >= 3
    assert steps(run, "base") == list(range(1, 21))


def test_killing_uv_kills_what_it_started():
    """`kill -9` of `uv run nanolib …` hits uv alone; the command must notice."""
    uv = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    script = (
        "import sys\nfrom nanolib import launch\nfrom nanolib.ui import cli\n"
        "launch.WORKER = 'tests.fake_stages'\n"
        "sys.exit(cli.main(['stage', 'report', '--profile', 'smoke']))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", uv, sys.executable, "-c", script],
        env=os.environ | {"FAKE_SLEEP": "0.5", "UV_RUN_RECURSION_DEPTH": "1"},
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
    )
    place = Path(os.environ["NANOLIB_RUNS"]) / "smoke" / "report"
    wait((place / "metrics.jsonl").exists)
    members = family(parent.pid)
    assert len(members) == 2
    parent.kill()
    parent.wait()
    wait(lambda: not survivors(members))
    assert (place / "saved.json").exists() and not (place / "done.json").exists()


def test_two_commands_at_once(notebooks):
    first = command(notebooks, "run", "smoke")
    wait(lambda: list(Path(os.environ["NANOLIB_RUNS"]).glob("smoke/base/metrics.jsonl")))
    second = command(notebooks, "run", "smoke")
    _, errors = second.communicate(timeout=HANG)
    assert second.returncode == 2 and f"(process {first.pid}) is executing run 'smoke'" in errors
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=HANG)
    json.loads(Path(os.environ["NANOLIB_RUNS"], "smoke", "manifest.json").read_text())


# ---------------------------------------------------------------------------- in the background


@pytest.fixture
def detached(notebooks, monkeypatch):
    """`nanolib run smoke --detach` over our chapters; ends what it started."""
    monkeypatch.setattr(pipeline, "COMMAND", (sys.executable, "-c", COMMAND, str(notebooks)))
    monkeypatch.setenv("FAKE_SLEEP", "base:0.1")
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")  # as under `uv run`
    started = []

    def start(capsys, *words: str) -> int:
        pipeline.detach("smoke", None, dict(zip(words[::2], words[1::2], strict=True)))
        started.append(int(capsys.readouterr().out.split("process ")[1].split()[0]))
        return started[-1]

    yield start
    left = [psutil.Process(process) for process in started if psutil.pid_exists(process)]
    for process in left:
        process.terminate()
    wait(lambda: not survivors(left))


def test_a_detached_run_is_watched_to_its_end(detached, capsys):
    pid = detached(capsys)
    assert os.getsid(pid) == pid  # out of reach of this terminal
    run = Run.load("smoke")
    assert pipeline.running(run) == pid
    with pytest.raises(ValueError, match=rf"\(process {pid}\) is executing run 'smoke'"):
        pipeline.detach("smoke", None, {})
    assert cli.main(["watch"]) == 0
    out = capsys.readouterr().out
    assert "base       20/20  loss 0.050  done" in out and "run smoke is finished" in out
    assert "run smoke is finished" in pipeline.log_path(run).read_text()
    assert cli.main(["watch", "--run", "smoke"]) == 0  # and when it is over
    out = capsys.readouterr().out
    assert "shards     20/20" in out and "run smoke is finished" in out


def test_a_detached_run_outlives_its_starter_and_is_stopped_by_kill(notebooks, detached, capsys):
    script = COMMAND.replace("sys.exit(cli", "pipeline.COMMAND = BACK\nsys.exit(cli")
    back = (sys.executable, "-c", COMMAND, str(notebooks))  # what --detach then starts
    script = f"from nanolib import pipeline\nBACK = {back!r}\n{script}"
    starter = command(notebooks, "run", "smoke", "--detach", script=script, FAKE_SLEEP="base:0.3")
    out, errors = starter.communicate(timeout=HANG)
    assert starter.returncode == 0, errors
    pid, run = int(out.split("process ")[1].split()[0]), Run.load("smoke")
    wait(lambda: len(steps(run, "base")) >= 2)
    members = [psutil.Process(pid), *family(pid)]
    os.kill(pid, signal.SIGTERM)
    wait(lambda: not survivors(members))
    assert cli.main(["watch"]) == 1
    errors = capsys.readouterr().err
    assert "nothing is running" in errors and "stopped; run the same command to go on" in errors
    assert steps(run, "base")[-1] == json.loads((run.stage("base").path / "saved.json").read_text())


def test_watch_shows_why_a_detached_run_failed(detached, capsys, monkeypatch):
    monkeypatch.setenv("FAKE", "base:crash")
    detached(capsys)
    assert cli.main(["watch"]) == 1
    errors = capsys.readouterr().err
    assert "nanolib run smoke --run smoke" in errors and "something broke here" in errors


def test_a_mistake_is_told_by_the_starter(notebooks, detached, capsys, monkeypatch):
    assert cli.main(["run", "nothing", "--detach"]) == 2
    assert "'nothing'" in capsys.readouterr().err
    assert cli.main(["run", "smoke", "--detach", "--base.steps", "-1"]) == 2
    assert not list(Path(os.environ["NANOLIB_RUNS"]).glob("*"))
    failing = "import sys; print('error: no such thing'); sys.exit(2)"
    monkeypatch.setattr(pipeline, "COMMAND", (sys.executable, "-c", failing))
    with pytest.raises(ValueError, match=r"^no such thing$"):
        pipeline.detach("smoke", None, {})


def test_watching_what_does_not_run(notebooks, capsys):
    assert cli.main(["watch"]) == 2
    run = Run.open("smoke")
    assert cli.main(["watch"]) == 1
    assert "nothing is running, and run smoke is not finished" in capsys.readouterr().err
    assert pipeline.running(run) is None


def test_settings_survive_the_command_line():
    given = {
        "base.steps": None,
        "base.lr": 0.25,
        "machine.ranks": 2,
        "sft.enabled": False,
        "eval.tasks": ["mmlu", "gsm8k"],
        "data.source": "toyworld",
    }
    words = [f"--{key}={config.as_text(value)}" for key, value in given.items()]
    assert config.split_settings(words) == ([], config.check_overrides(given))


@pytest.mark.parametrize("deaths, starts", [(0, 1), (2, 3), (3, 3)])
def test_a_kernel_that_dies_as_it_starts_is_started_again(monkeypatch, deaths, starts):
    tried = []

    def execute(*given):
        tried.append(given)
        if len(tried) <= deaths:
            raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr("papermill.execute_notebook", execute)
    fails = pytest.raises(RuntimeError) if deaths == starts else contextlib.nullcontext()
    with fails:
        pipeline._execute_notebook("chapter")
    assert tried == [("chapter",)] * starts


def test_a_kernel_that_dies_later_is_not_started_again(monkeypatch):
    tried = []

    def execute():
        tried.append(1)
        raise RuntimeError("Kernel died")

    monkeypatch.setattr("papermill.execute_notebook", execute)
    with pytest.raises(RuntimeError):
        pipeline._execute_notebook()
    assert tried == [1]
