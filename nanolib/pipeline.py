"""The chain: executing every chapter of the course, in order, is the training run.

papermill executes ``notebooks/NN_topic.py`` with the parameters ``profile``, ``run`` and
``overrides``; the chapters launch the stages. A chapter finished with the same source and recipe is
skipped, and finished stages return at once, so the same command goes on where the last one ended.

A stage that fails stops the chain. A chapter's own code that fails (its lesson: an assert, a plot)
does not: the next chapters run, the command ends with an error, and the same command executes the
chapter again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanolib import attempts, config, launch, runbook, rundir
from nanolib.progress import Line, clock, title
from nanolib.rundir import Run

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = config.REPOSITORY / "notebooks"
PARAMETERS = ("profile", "run", "overrides")
COMMAND = (sys.executable, "-m", "nanolib")  # what `detach` starts; tests put their own here


class ChapterError(RuntimeError):
    """A chapter ended early, or its lesson failed; the message says where to look."""


def run(profile: str, run: str | None = None, overrides: Mapping[str, Any] | None = None) -> Run:
    """Execute all chapters for a run, making it if there is none, and say where its results are.

    Raises ValueError for a user's mistake; ChapterError at once when a stage fails, at the end when
    a lesson failed; KeyboardInterrupt once everything that was running has saved and ended.
    """
    this = Run.open(profile, run, overrides)
    parameters = {"profile": profile, "run": this.name, "overrides": dict(overrides or {})}
    line = Line()
    follower = launch.Follower(lambda: launch.stage_dirs(this), line)
    with only_one(this), attempts.recorded(this.path, this.config.machine.dollars_per_hour):
        line.say(f"run {this.name}: {this.path}")
        follower.look()
        try:
            for chapter in _chapters(this):
                _bring_to_end(chapter, parameters, line, follower)
            _update_run_book(this)
        except KeyboardInterrupt:
            line.say("stopping: what is running saves its last step")
            follower.follow(lambda: launch.is_busy(this))
            line.say("stopped; run the same command to go on")
            raise
        finally:
            line.close()
    _tell_finished(this, line)
    return this


def dry_run(
    profile: str, run: str | None, overrides: Mapping[str, Any], on: str | None = None
) -> Iterator[str]:
    """Lines that say what `run` would do: the data, the plan and the stages.

    Nothing is written, fetched or trained. on: the machine the run is meant for, such as "8xH100";
    None: this one. Raises ValueError at the first mistake.
    """
    from nanolib import accounting, hub, planning
    from nanolib.stages import text

    machine = accounting.Machine.parse(on) if on else None
    for source in chapters():
        read(source)
    this = Run.peek(profile, run, overrides)
    yield f"run {this.name}: {'exists' if this.exists() else 'would be made'} at {this.path}"
    mirror = this.mirror()
    if this.config.recipe.data.source == "toyworld":
        yield "data         the toy world, which the run writes itself"
    elif mirror == this.stage("data").path / "mirror" and not mirror.is_dir():
        yield "data         from the hub, which is not asked now (give --mirror FOLDER to check one)"
    else:
        files = hub.text_files(this.config, mirror)
        text.check_tasks(this)
        yield f"data         {mirror}: {len(files.train)} training text files, all tasks complete"
    yield from planning.plan(this.config, machine or planning.this_machine(this.config.machine))
    stages = [this.stage(name, of) for name, of in launch.all_stages(this)]
    words = [title(stage) + " (finished)" * (stage.done() is not None) for stage in stages]
    yield f"stages       {', '.join(words)}"


# ---------------------------------------------------------------------------- chapters


def chapters() -> list[Path]:
    """The chapters' sources in order: ``notebooks/NN_topic.py``."""
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))
    if not found:
        raise ValueError(f"there are no chapters in {NOTEBOOKS}; is this a whole checkout?")
    return found


def read(source: Path) -> NotebookNode:
    """A chapter as a notebook; ValueError unless its parameters cell sets PARAMETERS, in order."""
    import jupytext
    from papermill.translators import PythonTranslator

    notebook = jupytext.read(source)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = [parameter.name for cell in cells for parameter in PythonTranslator.inspect(cell)]
    if tuple(names) != PARAMETERS:
        raise ValueError(
            f"{source} needs one cell tagged 'parameters' that sets {', '.join(PARAMETERS)}, one a "
            f"line; found {', '.join(names) or 'nothing'}"
        )
    return notebook


@dataclass(frozen=True)
class Chapter:
    """One chapter of a run: its source and what executing it leaves in the run's directory."""

    source: Path
    run: Run

    @property
    def name(self) -> str:
        return self.source.stem

    @property
    def notebook(self) -> Path:
        """The executed copy."""
        return self.run.path / "chapters" / f"{self.name}.ipynb"

    @property
    def record_path(self) -> Path:
        return self.notebook.with_suffix(".done.json")

    def fingerprint(self) -> str:
        """What the chapter depends on: its source and the recipe."""
        recipe = json.dumps(config.flatten(self.run.config.recipe), sort_keys=True)
        return hashlib.sha256(self.source.read_bytes() + recipe.encode()).hexdigest()

    def record(self) -> dict[str, Any] | None:
        """How it ended with this source and recipe; None until then."""
        if not self.record_path.exists() or not self.notebook.exists():
            return None
        record = json.loads(self.record_path.read_text(encoding="utf-8"))
        return record if record["fingerprint"] == self.fingerprint() else None

    def failure(self) -> str | None:
        """What its lesson failed with, if it did."""
        return (self.record() or {}).get("failure")


def _chapters(run: Run) -> list[Chapter]:
    return [Chapter(source, run) for source in chapters()]


def _bring_to_end(
    chapter: Chapter, parameters: Mapping[str, Any], line: Line, follower: launch.Follower
) -> None:
    """Execute a chapter unless it is finished, and keep its notebook, HTML and record."""
    if chapter.record() and not chapter.failure():
        line.say(f"chapter {chapter.name}: finished before")
        return
    line.say(f"chapter {chapter.name}")
    chapter.record_path.unlink(missing_ok=True)
    fingerprint, started = chapter.fingerprint(), time.monotonic()
    over = threading.Event()
    thread = threading.Thread(target=follower.follow, args=[lambda: not over.is_set()])
    thread.start()
    try:
        with rundir.saving(chapter.notebook):
            failure = _execute(chapter, parameters)
    finally:
        over.set()
        thread.join()
    seconds = time.monotonic() - started
    record = {"fingerprint": fingerprint, "seconds": seconds, "failure": failure}
    rundir.write_json(chapter.record_path, record | {"finished": rundir.now()})
    _update_run_book(chapter.run)
    ended = f"its lesson failed ({failure})" if failure else f"done in {clock(seconds)}"
    line.say(f"chapter {chapter.name}: {ended}")


def _update_run_book(run: Run) -> None:
    runbook.write(run, [source.stem for source in chapters()])


def _execute(chapter: Chapter, parameters: Mapping[str, Any]) -> str | None:
    """Execute one chapter with papermill, in the notebooks' folder, with a kernel of its own.

    Returns None, or what its lesson failed with. Raises ValueError for a user's mistake about a
    stage, ChapterError where a stage failed or the kernel died.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    # After Ctrl-C both log that the kernel is dead, which we learn from an exception.
    for logger in ("papermill", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    chapter.notebook.parent.mkdir(parents=True, exist_ok=True)
    for helper in NOTEBOOKS.glob("[!0-9]*.py"):  # a reader may run the executed chapters there
        shutil.copy(helper, chapter.notebook.parent)
    try:
        papermill.execute_notebook(
            read(chapter.source),
            chapter.notebook,
            parameters=dict(parameters),
            kernel_name="python3",
            language="python",
            cwd=NOTEBOOKS,
            progress_bar=False,
            shutdown_kernel="immediate",
            extra_arguments=["--log-level=40"],  # errors only
        )
    except papermill.PapermillExecutionError as error:
        message = f"chapter {chapter.name} ({chapter.notebook}): {error.evalue or error.ename}"
        if error.ename == "StageError":
            raise ValueError(message) from None
        if error.ename in ("WorkerError", "KeyboardInterrupt"):
            raise ChapterError(message) from None
        return f"{error.ename}: {error.evalue}".strip().partition("\n")[0]
    except DeadKernelError:
        raise ChapterError(
            f"the kernel of chapter {chapter.name} died (killed, or out of memory?); what its "
            "stages saved is kept: run the same command to go on"
        ) from None
    return None


# ---------------------------------------------------------------------------- the state of a run


def _lock(run: Run) -> Path:
    return run.path / "chapters" / ".lock"


@contextlib.contextmanager
def only_one(run: Run) -> Generator[None, None, None]:
    """Keep other commands from executing the run's chapters; the lock file has our process id."""
    with launch.locked(_lock(run)) as lock:
        if lock is None:
            raise ValueError(
                f"another command (process {running(run)}) is executing run {run.id!r}; follow it "
                "with nanolib watch, wait for it, or start another with --run NAME"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        yield


def running(run: Run) -> int | None:
    """The process id of the command that is executing a run's chapters, if any."""
    if not _lock(run).exists():
        return None
    with launch.locked(_lock(run)) as lock:
        return int(_lock(run).read_text() or 0) if lock is None else None


def next_chapter(run: Run) -> str | None:
    """The first chapter not yet executed to its end: while a command runs, its current one."""
    return next((chapter.name for chapter in _chapters(run) if not chapter.record()), None)


def _tell_finished(run: Run, line: Line) -> None:
    """Say where a run's results are; ChapterError where lessons failed."""
    failed = [f"  {c.notebook}: {c.failure()}" for c in _chapters(run) if c.failure()]
    report = run.path / "report.md"
    line.say(f"run {run.name} is finished")
    line.say(f"  chapters  {run.path / 'chapters' / 'index.html'}")
    if report.exists():
        line.say(f"  report    {report}")
    line.say(f"  chat      uv run nanolib chat --run {run.name}")
    if failed:
        failed.insert(0, "these lessons failed; the same command tries them again:")
        raise ChapterError("\n".join(failed))


# ---------------------------------------------------------------------------- in the background


def log_path(run: Run) -> Path:
    """What detached commands print, one after another."""
    return run.path / "run.log"


def detach(profile: str, run: str | None, overrides: Mapping[str, Any]) -> None:
    """Start ``nanolib run`` in a session of its own, and say how to watch and stop it.

    Returns once the run is under way. Raises ValueError for a user's mistake, also where another
    command is executing the run, ChapterError where the new one ends before it begins.
    """
    this = Run.open(profile, run, overrides)
    with only_one(this):
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
            # With this variable it would end together with the `uv run` that started us.
            env={k: v for k, v in os.environ.items() if k != "UV_RUN_RECURSION_DEPTH"},
            start_new_session=True,
        )
    while running(this) != process.pid and (code := process.poll()) != 0:
        if code is not None:
            error = _last_words(log.read_bytes()[begin:].decode(errors="replace"))
            kind = ValueError if code == 2 else ChapterError
            raise kind(error or f"the run ended at once (exit code {code})")
        time.sleep(0.05)
    print(
        f"run {this.name} runs in the background as process {process.pid}\n"
        f"  log    {log}\n"
        f"  watch  uv run nanolib watch --run {this.name}\n"
        f"  stop   kill {process.pid}   (it saves first; the same command goes on)"
    )


def _last_words(text: str) -> str:
    """The error that a command's output ends with, else its last line."""
    _, found, error = ("\n" + text).rpartition("\nerror: ")
    return (error if found else text.strip().rpartition("\n")[2]).strip()


def watch(run: Run) -> None:
    """Show a run's finished stages, then follow what is working on it until nothing is.

    Raises ChapterError unless the run is finished, or only stages ran and they are done.
    """
    line = Line()
    line.say(f"run {run.name}: {run.path}")
    seen: set[str] = set()  # who worked on the run while we watched
    current: str | None = None

    def working() -> bool:
        nonlocal current
        if running(run):
            seen.add("command")
            if (chapter := next_chapter(run)) != current:
                line.say(f"chapter {chapter}" if chapter else "all chapters are finished")
            current = chapter
            return True
        if busy := launch.is_busy(run):
            seen.add("stage")
        return busy

    launch.Follower(lambda: launch.stage_dirs(run), line).follow(working)
    line.close()
    if next_chapter(run) is None:
        _tell_finished(run, line)
    elif seen == {"stage"} and all(stage.done() for stage in launch.stage_dirs(run)):
        line.say("what ran is done")
    else:
        raise ChapterError(_unfinished(run))


def _unfinished(run: Run) -> str:
    """How to go on with a run, and the error of its last detached command if nothing ran since."""
    text = (
        f"nothing is running, and run {run.name} is not finished; go on with it: "
        f"nanolib run {run.config.profile} --run {run.name}"
    )
    log, lock = log_path(run), _lock(run)
    if log.exists() and lock.exists() and log.stat().st_mtime >= lock.stat().st_mtime:
        text += f"; it said:\n{_last_words(log.read_text(errors='replace'))}"
    return text
