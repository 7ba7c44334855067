"""A run without a terminal: ``nanolib run demo --detach`` starts it, ``nanolib watch`` follows it.

Nothing else outlives the one who started it: the detached command is the same command in a session
of its own, and its kernels and workers end with it as ever.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanolib import config, launch, pipeline
from nanolib.progress import Line
from nanolib.rundir import Run

COMMAND = (sys.executable, "-m", "nanolib")  # tests put their own here
POLL = 0.3  # seconds between looks


def log_path(run: Run) -> Path:
    """What detached commands print; one after another."""
    return run.path / "run.log"


# ---------------------------------------------------------------------------- start


def detach(profile: str, run: str | None, overrides: Mapping[str, Any]) -> None:
    """Start ``nanolib run`` in the background and say how to watch and stop it.

    Returns once the run is under way. Raises ValueError for a user's mistake, also where another
    command executes the run, ChapterError where the new one ends before it begins.
    """
    pipeline.chapters()
    this = Run.open(profile, run, overrides)
    with pipeline.only_one(this):
        pass
    words = [f"--{key}={config.as_text(value)}" for key, value in overrides.items()]
    log = log_path(this)
    with log.open("ab") as out:
        begin = out.tell()
        process = subprocess.Popen(
            [*COMMAND, "run", profile, "--run", this.name, *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            # Without this word it would end with the `uv run` that started us.
            env={k: v for k, v in os.environ.items() if k != "UV_RUN_RECURSION_DEPTH"},
            start_new_session=True,
        )
    while pipeline.running(this) != process.pid and pipeline.unfinished(this):
        if process.poll() is not None:
            raise _failure(process.returncode, log.read_bytes()[begin:].decode(errors="replace"))
        time.sleep(0.05)
    print(
        f"run {this.name} runs in the background as process {process.pid}\n"
        f"  log    {log}\n"
        f"  watch  uv run nanolib watch --run {this.name}\n"
        f"  stop   kill {process.pid}   (it saves first; the same command goes on)"
    )


def _failure(code: int, text: str) -> Exception:
    """What a command that ended with this exit code had to say."""
    kind = ValueError if code == 2 else pipeline.ChapterError
    return kind(_last_words(text) or f"the run ended at once (exit code {code})")


def _last_words(text: str) -> str:
    """The error that a command's output ends with, else its last line."""
    _, found, error = ("\n" + text).rpartition("\nerror: ")
    return (error if found else text.strip().rpartition("\n")[2]).strip()


# ---------------------------------------------------------------------------- watch


def watch(run: Run) -> None:
    """Show a run's finished stages, then follow what works on it until nothing does.

    Returns when the run is finished, or a lone stage is done; raises ChapterError otherwise, with
    what is known of the reason.
    """
    line = Line()
    line.say(f"run {run.name}: {run.path}")
    followers: dict[Path, launch.Follower] = {}
    chapter, seen = None, ""
    while True:
        lives = _works(run)  # asked before looking, so that the last rows are shown
        now = pipeline.unfinished(run) if lives == "command" else chapter
        if now != chapter:
            line.say(f"chapter {now.stem}" if now else "all chapters are finished")
        chapter = now
        for place in launch.places(run):
            followers.setdefault(place.path, launch.Follower(place, line)).look()
        if not lives:
            break
        seen = "command" if "command" in (seen, lives) else lives
        time.sleep(POLL)
    line.close()
    _tell_end(run, line, seen)


def _works(run: Run) -> str:
    """Who works on the run: a "command" that executes chapters, a lone "stage", or nobody ("")."""
    if pipeline.running(run):
        return "command"
    return "stage" if any(map(launch.is_running, launch.places(run))) else ""


def _tell_end(run: Run, line: Line, seen: str) -> None:
    """Say how it ended; `seen`: who worked on it while we watched."""
    if pipeline.unfinished(run) is None:
        line.say(pipeline.where(run))
    elif seen == "stage" and all(place.done() for place in launch.places(run)):
        line.say("what ran is done")
    else:
        goes_on = f"go on with it: nanolib run {run.config.profile} --run {run.name}"
        quiet = "nothing runs any more" if seen else "nothing is running"
        log, begin = log_path(run), pipeline.started(run)
        detached = begin and log.exists() and log.stat().st_mtime >= begin
        words = f"; it said:\n{_last_words(log.read_text(errors='replace'))}" if detached else ""
        raise pipeline.ChapterError(
            f"{quiet}, and run {run.name} is not finished; {goes_on}{words}"
        )
