"""The pipeline: a training run executes all chapters of the course in order.

papermill executes ``notebooks/NN_topic.py``, and the chapters launch the stages. Finished chapters
and stages are skipped. A failed stage stops the run. An error in a chapter's own code (its lesson:
an assert, a plot) does not, but it is reported at the end, and the next run executes it again.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanolib import config, launch, runbook, rundir
from nanolib.config import Overrides
from nanolib.progress import Line, clock, title
from nanolib.rundir import Run

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = config.REPOSITORY / "notebooks"
PARAMETERS = ("profile", "run", "overrides")
COMMAND = (sys.executable, "-m", "nanolib")  # what `detach` starts; replaced in tests


class ChapterError(RuntimeError):
    """A chapter was interrupted, or its lesson failed; the message says where to look."""


def run(profile: str, run: str | None = None, overrides: Overrides = None) -> Run:
    """Execute all chapters for a run, creating it if needed, and print where its results are.

    Raises ChapterError at once if a stage fails, at the end if a lesson did. Ctrl-C saves first.
    """
    this = Run.open(profile, run, overrides)
    parameters = {"profile": profile, "run": this.name, "overrides": dict(overrides or {})}
    line, machine = Line(run=this), this.config.machine
    follower = launch.Follower(this.stages(), line)
    if launch.node(machine)[0]:  # node 0 executes the chapters, others join its stages
        for stage in this.stages()[:-1]:
            launch.stage(stage.name, this, stage.of, watch=line)
        return this
    attempt = rundir.recorded(this.path, machine.dollars_per_hour)
    with only_one(this), attempt, contextlib.closing(line):
        line.say(f"run {this.name}: {this.path}")
        follower.look()
        try:
            for chapter in chapters():
                _bring_to_end(this, chapter, parameters, follower, line)
                runbook.write(this, [source.stem for source in chapters()])
        except KeyboardInterrupt:
            line.say("stopping: what is running saves its last step")
            follower.follow(lambda: launch.is_busy(this))
            line.say("stopped; run the same command to go on")
            raise
    _tell_finished(this, line)
    return this


def dry_run(
    profile: str, run: str | None, overrides: Mapping[str, Any], on: str | None = None
) -> Iterator[str]:
    """Lines that say what `run` would do on machine `on` ("8xH100"; None: this one)."""
    from nanolib import accounting, hub, planning
    from nanolib.stages import text

    for source in chapters():
        read(source)
    this = Run.peek(profile, run, overrides)
    yield f"run {this.name}: {'exists' if this.exists() else 'would be made'} at {this.path}"
    mirror = this.mirror()
    if this.config.recipe.data.source == "toyworld":
        yield "data         the toy world, which the run writes itself"
    elif text.has_own_mirror(this) and not mirror.is_dir():
        yield "data         from the hub, which is not asked now (give --mirror FOLDER to check one)"
    else:
        own_text = this.config.recipe.data.text
        count = "no" if own_text else len(hub.text_files(this.config, mirror).train)
        text.check_tasks(this)
        yield f"data         {mirror}: {count} training text files, all tasks complete"
    here = this.config.machine
    machine = accounting.Machine.parse(on) if on else planning.this_machine(here)
    yield from planning.plan(this.config, machine, text.known(this))
    words = [title(it) + " (finished)" * (it.done() is not None) for it in this.stages()]
    yield f"stages       {', '.join(words)}"


def chapters() -> list[Path]:
    if found := sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py")):
        return found
    raise ValueError(f"there are no chapters in {NOTEBOOKS}; is this a whole checkout?")


def read(source: Path) -> NotebookNode:
    """Load a chapter as a notebook; ValueError unless its parameters cell sets PARAMETERS."""
    import jupytext
    from papermill.translators import PythonTranslator

    notebook = jupytext.read(source)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    found = ", ".join(each.name for cell in cells for each in PythonTranslator.inspect(cell))
    if found != (wanted := ", ".join(PARAMETERS)):
        needs = f"one cell tagged 'parameters' that sets {wanted}, one a line"
        raise ValueError(f"{source} needs {needs}; found {found or 'nothing'}")
    return notebook


def executed(run: Run, chapter: Path) -> Path:
    return run.path / "chapters" / f"{chapter.stem}.ipynb"


def _fingerprint(run: Run, chapter: Path) -> str:
    recipe = json.dumps(config.flatten(run.config.recipe), sort_keys=True)
    return hashlib.sha256(chapter.read_bytes() + recipe.encode()).hexdigest()


def _record(run: Run, chapter: Path) -> dict[str, Any]:
    """How a chapter ended; empty if it has not run with this source and recipe."""
    notebook = executed(run, chapter)
    path = notebook.with_suffix(".done.json")
    record = json.loads(path.read_text()) if path.exists() and notebook.exists() else {}
    return record if record.get("fingerprint") == _fingerprint(run, chapter) else {}


def _bring_to_end(
    run: Run, chapter: Path, parameters: dict[str, Any], follower: launch.Follower, line: Line
) -> None:
    """Execute a chapter, unless finished, and save its notebook and record."""
    if (before := _record(run, chapter)) and not before.get("failure"):
        line.say(f"chapter {chapter.stem}: finished before")
        return
    line.say(f"chapter {chapter.stem}")
    path = executed(run, chapter).with_suffix(".done.json")
    path.unlink(missing_ok=True)
    fingerprint, started = _fingerprint(run, chapter), time.monotonic()
    over = threading.Event()
    thread = threading.Thread(target=follower.follow, args=[lambda: not over.is_set()])
    thread.start()
    try:
        with rundir.saving(path):
            failure = _execute(chapter, executed(run, chapter), parameters)
    finally:
        over.set()
        thread.join()
    seconds = time.monotonic() - started
    record = {"fingerprint": fingerprint, "seconds": seconds, "failure": failure}
    rundir.write_json(path, record | {"finished": rundir.now()})
    ended = f"its lesson failed ({failure})" if failure else f"done in {clock(seconds)}"
    line.say(f"chapter {chapter.stem}: {ended}")


def _execute(chapter: Path, target: Path, parameters: dict[str, Any]) -> str | None:
    """Execute one chapter in a kernel; returns the error of its lesson, or None.

    Raises ValueError for a StageError (a user error), ChapterError if a stage failed.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    for logger in ("papermill", "asyncio"):  # both also log a dead kernel
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # Copy the helper files, so that a reader can rerun the executed chapters.
    others = shutil.ignore_patterns("[0-9][0-9]_*", ".*", "__pycache__")
    shutil.copytree(NOTEBOOKS, target.parent, ignore=others, dirs_exist_ok=True)
    try:
        _execute_notebook(
            read(chapter),
            target,
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=NOTEBOOKS,
            progress_bar=False,
            shutdown_kernel="immediate",
            extra_arguments=["--log-level=40"],  # errors only
        )
    except papermill.PapermillExecutionError as error:
        message = f"chapter {chapter.stem} ({target}): {error.evalue or error.ename}"
        if error.ename == "StageError":
            raise ValueError(message) from None
        if error.ename in ("WorkerError", "KeyboardInterrupt"):
            raise ChapterError(message) from None
        return f"{error.ename}: {error.evalue}".strip().partition("\n")[0]
    except DeadKernelError:
        how = f"the kernel of chapter {chapter.stem} died (killed, or out of memory?)"
        raise ChapterError(f"{how}; run the same command to go on from what was saved") from None
    return None


def _execute_notebook(*given: Any, **settings: Any) -> None:
    """papermill.execute_notebook, retried if the kernel dies on startup: Jupyter picks ports before
    the kernel binds them, so another process may have taken one."""
    import papermill

    for last in (False, False, True):
        try:
            papermill.execute_notebook(*given, **settings)
            return
        except RuntimeError as error:
            if last or "died before replying" not in str(error):
                raise


def _lock(run: Run) -> Path:
    """Lock file of the command that executes the run's chapters; contains its process id."""
    return run.path / "chapters" / ".lock"


@contextlib.contextmanager
def only_one(run: Run) -> Generator[None, None, None]:
    with launch.locked(_lock(run)) as lock:
        if lock is None:
            other = f"another command (process {running(run)}) is executing run {run.id!r}"
            raise ValueError(f"{other}; follow it with nanolib watch, or give another --run NAME")
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        yield


def running(run: Run) -> int | None:
    """Process id of the command executing a run's chapters, or None."""
    return int(_lock(run).read_text() or 0) if launch.is_locked(_lock(run)) else None


def _tell_finished(run: Run, line: Line) -> None:
    line.say(f"run {run.name} is finished\n  chapters  {run.path / 'chapters' / 'index.html'}")
    if (run.path / "report.md").exists():
        line.say(f"  report    {run.path / 'report.md'}")
    line.say(f"  chat      uv run nanolib chat --run {run.name}")
    failures = {source: _record(run, source).get("failure") for source in chapters()}
    if failed := [f"\n  {executed(run, it)}: {why}" for it, why in failures.items() if why]:
        message = "these lessons failed; the same command tries them again:"
        raise ChapterError(message + "".join(failed))


def log_path(run: Run) -> Path:
    return run.path / "run.log"


def detach(profile: str, run: str | None, overrides: Mapping[str, Any]) -> None:
    """Start ``nanolib run`` in the background; returns once it is running."""
    this = Run.open(profile, run, overrides)
    with only_one(this):
        pass
    words = [f"--{key}={config.as_text(value)}" for key, value in overrides.items()]
    with log_path(this).open("ab") as out:
        begin = out.tell()
        process = subprocess.Popen(
            [*COMMAND, "run", profile, "--run", this.name, *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            # With this variable set, it would end together with our own `uv run`.
            env={k: v for k, v in os.environ.items() if k != "UV_RUN_RECURSION_DEPTH"},
            start_new_session=True,
        )
    while running(this) != process.pid and (code := process.poll()) != 0:
        if code is not None:
            error = _last_words(this, begin) or f"the run ended at once (exit code {code})"
            raise ValueError(error) if code == 2 else ChapterError(error)
        time.sleep(0.05)
    print(f"run {this.name} runs in the background as process {process.pid}")
    print(f"  log    {log_path(this)}")
    print(f"  watch  uv run nanolib watch --run {this.name}")
    print(f"  stop   kill {process.pid}   (it saves first; the same command goes on)")


def _last_words(run: Run, begin: int = 0) -> str:
    """The last error in a run's log after byte `begin`, or else its last line."""
    text = log_path(run).read_bytes()[begin:].decode(errors="replace")
    _, found, error = ("\n" + text).rpartition("\nerror: ")
    return (error if found else text.strip().rpartition("\n")[2]).strip()


def watch(run: Run) -> None:
    """Show a run's progress until no process works on it; ChapterError unless it is finished."""
    with contextlib.closing(Line(run=run)) as line:
        line.say(f"run {run.name}: {run.path}")
        follower = launch.Follower(run.stages(), line)
        follower.follow(lambda: running(run) is not None or launch.is_busy(run))
    if all(_record(run, source) for source in chapters()):
        _tell_finished(run, line)
        return
    log, message = log_path(run), f"nothing is running, and run {run.name} is not finished; go on"
    message += f" with it: nanolib run {run.config.profile} --run {run.name}"
    # The log tells why, unless another command has run since.
    if log.exists() and log.stat().st_mtime >= _lock(run).stat().st_mtime:
        message += f"; it said:\n{_last_words(run)}"
    raise ChapterError(message)
