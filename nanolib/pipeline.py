"""The chain: every chapter of the course, executed in order, is the training run.

papermill executes ``notebooks/NN_topic.py`` with the parameters ``profile``, ``run`` and
``overrides``; the chapters launch the stages. A chapter finished with the same source and recipe
is skipped, an interrupted one is executed again, and finished stages return at once, so the same
command goes on wherever the last one ended.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nanolib import attempts, config, launch, runbook, rundir
from nanolib.progress import Line, clock
from nanolib.rundir import Run

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = config.REPOSITORY / "notebooks"
PARAMETERS = ("profile", "run", "overrides")


class ChapterError(RuntimeError):
    """A chapter ended early; the message says where to look."""


def run(profile: str, run: str | None = None, overrides: Mapping[str, Any] | None = None) -> Run:
    """Execute all chapters for a run, making it if there is none, and say where things are.

    Raises ValueError for a user's mistake, ChapterError when a chapter fails, KeyboardInterrupt
    once everything that was running has saved and ended.
    """
    this = Run.open(profile, run, overrides)
    parameters = {"profile": profile, "run": this.name, "overrides": dict(overrides or {})}
    line = Line()
    with only_one(this), attempts.recorded(this.path, this.config.machine.dollars_per_hour):
        line.say(f"run {this.name}: {this.path}")
        try:
            for source in chapters():
                _chapter(source, this, parameters, line)
            _bind(this)
        except KeyboardInterrupt:
            line.say("stopping: what is running saves its last step")
            launch.wait_until_idle(this)
            line.say("stopped; run the same command to go on")
            raise
    line.say(where(this))
    return this


def chapters() -> list[Path]:
    """The chapters' sources in order: ``notebooks/NN_topic.py``."""
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))
    if not found:
        raise ValueError(f"there are no chapters in {NOTEBOOKS}; is this a whole checkout?")
    return found


def read(source: Path) -> NotebookNode:
    """A chapter as a notebook; ValueError unless its parameters cell is the agreed one."""
    import jupytext

    notebook = jupytext.read(source)
    cells = [c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    names = [
        target.id
        for cell in cells
        for statement in ast.parse(cell).body
        for target in ast.walk(statement)
        if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
    ]
    if len(cells) != 1 or tuple(names) != PARAMETERS:
        raise ValueError(
            f"{source} needs one cell tagged 'parameters' that sets {', '.join(PARAMETERS)}; "
            f"found {len(cells)} that set {', '.join(names) or 'nothing'}"
        )
    return notebook


# ---------------------------------------------------------------------------- one chapter


def _chapter(source: Path, run: Run, parameters: Mapping[str, Any], line: Line) -> None:
    """Execute one chapter unless it is finished, and keep its notebook, HTML and done record."""
    if _finished(source, run):
        line.say(f"chapter {source.stem}: finished before")
        return
    line.say(f"chapter {source.stem}")
    record, target = _record(source, run)
    fingerprint, started = _fingerprint(source, run), time.monotonic()
    with rundir.saving(target), _terminal_follows(run, line):
        _execute(source, target, parameters)
    seconds = time.monotonic() - started
    rundir.write_json(
        record, {"fingerprint": fingerprint, "seconds": seconds, "finished": rundir.now()}
    )
    _bind(run)
    line.say(f"chapter {source.stem}: done in {clock(seconds)}")


def _bind(run: Run) -> None:
    """Bring the run book up to date."""
    runbook.write(run, [source.stem for source in chapters()])


def _record(source: Path, run: Run) -> tuple[Path, Path]:
    """Where a chapter's done record and its executed notebook are."""
    target = run.path / "chapters" / f"{source.stem}.ipynb"
    return target.with_suffix(".done.json"), target


def _fingerprint(source: Path, run: Run) -> str:
    """What a finished chapter depends on: its source and the recipe."""
    recipe = json.dumps(config.flatten(run.config.recipe), sort_keys=True)
    return hashlib.sha256(source.read_bytes() + recipe.encode()).hexdigest()


def _finished(source: Path, run: Run) -> bool:
    record, target = _record(source, run)
    if not record.exists() or not target.exists():
        return False
    known = json.loads(record.read_text(encoding="utf-8"))
    return known["fingerprint"] == _fingerprint(source, run)


def _execute(source: Path, target: Path, parameters: Mapping[str, Any]) -> None:
    """papermill one chapter into `target`, in the notebooks' folder, with a kernel of its own."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    target.parent.mkdir(parents=True, exist_ok=True)
    _copy_helpers(target.parent)
    try:
        papermill.execute_notebook(
            read(source),
            target,
            parameters=dict(parameters),
            kernel_name="python3",
            language="python",
            cwd=NOTEBOOKS,
            engine_name=_engine(),
            progress_bar=False,
            shutdown_kernel="immediate",
            extra_arguments=["--log-level=40"],  # errors only
        )
    except papermill.PapermillExecutionError as error:
        raise _chapter_error(source, target, error) from None
    except DeadKernelError:
        raise ChapterError(
            f"the kernel of chapter {source.stem} died (killed, or out of memory?); what its "
            "stages saved is kept: run the same command to go on"
        ) from None


def _copy_helpers(folder: Path) -> None:
    """Put what chapters import (lesson.py) beside executed chapters: they can be run there again."""
    for helper in NOTEBOOKS.glob("[!0-9]*.py"):
        shutil.copy(helper, folder)


def _engine() -> str:
    """Register papermill's own engine, but for what it leaves behind on Ctrl-C; its name.

    Ctrl-C takes nbclient out of its event loop and leaves the tasks that wait for the kernel in
    there. Ending the kernel runs the loop again; a task that then finds the kernel dead says so on
    stderr, with a traceback. So they are ended first.
    """
    from jupyter_core.utils import ensure_event_loop
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, papermill_engines
    from papermill.log import logger

    class Client(PapermillNotebookClient):
        def papermill_execute_cells(self) -> None:
            try:
                super().papermill_execute_cells()
            except KeyboardInterrupt:
                _end_tasks(ensure_event_loop())
                raise

    class Ours(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
            known = Client.class_trait_names()
            options = {key: value for key, value in options.items() if key in known}
            Client(nb_man, kernel_name=kernel_name, log=logger, **options).execute()

    papermill_engines.register("nanolib", Ours)
    return "nanolib"


def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel every task of a loop that was left by an exception, and hear no more of them."""
    loop.set_exception_handler(lambda loop, context: None)  # of a task that Ctrl-C itself hit
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


def _chapter_error(source: Path, target: Path, error: Any) -> Exception:
    """What a cell's exception means to the one who typed the command."""
    where = f"chapter {source.stem}"
    if error.ename == "ValueError":
        return ValueError(f"{error.evalue} ({where}, see {target})")
    if error.ename == "WorkerError":
        return ChapterError(f"{where}: {error.evalue}")
    return ChapterError(f"{where}: {error.ename}: {error.evalue}\nThe traceback is in {target}")


# ---------------------------------------------------------------------------- around them


def _lock(run: Run) -> Path:
    return run.path / "chapters" / ".lock"


@contextlib.contextmanager
def only_one(run: Run) -> Generator[None, None, None]:
    """Two commands must not execute the same run's chapters at once; the lock names its holder."""
    path = _lock(run)
    with rundir.saving(path):
        path.parent.mkdir(exist_ok=True)
        lock = path.open("a")
    with lock:
        if not (_taken(lock) or _taken(lock, after=0.2)):  # once more: `running` may have looked
            raise ValueError(
                f"another command (process {running(run)}) is executing run {run.id!r}; follow it "
                "with nanolib watch, wait for it, or start another with --run NAME"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _taken(lock: IO[str], after: float = 0.0) -> bool:
    time.sleep(after)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def running(run: Run) -> int | None:
    """The process id of the command that executes a run's chapters now; None if there is none."""
    try:
        with _lock(run).open("r+") as lock:
            return None if _taken(lock) else int(lock.read() or 0)
    except FileNotFoundError:
        return None


def started(run: Run) -> float:
    """When the last command that executed the run's chapters began, by the files' clock; 0: never."""
    return _lock(run).stat().st_mtime if _lock(run).exists() else 0.0


def unfinished(run: Run) -> Path | None:
    """The source of the first chapter that is not finished; None: all are."""
    return next((source for source in chapters() if not _finished(source, run)), None)


@contextlib.contextmanager
def _terminal_follows(run: Run, line: Line) -> Generator[None, None, None]:
    """Show the running stages' progress while the body waits for a chapter."""
    over = threading.Event()
    followers: dict[Path, launch.Follower] = {}
    for place in launch.places(run):
        followers[place.path] = launch.Follower(place, line)
        if place.done():
            followers[place.path].skip()

    def follow() -> None:
        last = False
        while not last:
            last = over.wait(0.3)
            for place in launch.places(run):
                followers.setdefault(place.path, launch.Follower(place, line)).look()

    thread = threading.Thread(target=follow, name="terminal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        line.close()


def where(run: Run) -> str:
    report = run.path / "report.md"
    lines = [f"run {run.name} is finished", f"  chapters  {run.path / 'chapters' / 'index.html'}"]
    if report.exists():
        lines.append(f"  report    {report}")
    return "\n".join([*lines, f"  chat      uv run nanolib chat --run {run.name}"])
