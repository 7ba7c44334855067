"""Run a stage in processes of its own and follow it; the caller itself never trains.

The launcher locks ``<stage>/log.txt`` (flock) and hands it to the worker as standard output. The
lock belongs to the open file: the last rank holds it to its end, even when launcher or torchrun is
killed.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from nanolib import config, guard, rundir
from nanolib.rundir import Run, StageDir

WORKER: str = "nanolib.stages.worker"  # the module that runs a stage
PARALLEL = (*config.MODELS, "eval")  # the stages that run on several ranks
POLL = 0.2  # seconds between looks at what is running
TAIL = 30  # lines of the log that an error shows

Watch = Callable[[StageDir, Sequence[dict[str, Any]]], None]


class StageError(ValueError):
    """A user's mistake that keeps a stage from running or finishing."""


class WorkerError(RuntimeError):
    """A stage's process ended without finishing; the message has the tail of its log."""


def stage(name: str, run: Run, of: str | None = None, watch: Watch | None = None) -> dict[str, Any]:
    """Finish a stage, and before it the stages it needs; returns the result in its done record.

    of: the stage whose model ``eval`` scores; None: the run's last one. watch: see `Follower`. If
    another process runs the stage, follow that one, and take over if it ends early. Raises StageError
    for a user's mistake, WorkerError when the worker fails, KeyboardInterrupt after it has saved.
    """
    of = _scored_model(name, run, of)
    for needed in prerequisites(name, run, of):
        if run.stage(needed).done() is None:
            stage(needed, run, watch=watch)
    this = run.stage(name, of)
    if name == "report" and this.done():
        records = [it.path / "done.json" for it in run.stages() if it.done()]
        if (own := this.path / "done.json") != max(records, key=lambda it: it.stat().st_mtime_ns):
            own.unlink()  # a stage has finished since
    follower = Follower([this], watch)
    while (record := this.done()) is None:
        with locked(this.log) as log:
            if log is None:
                follower.follow(lambda: is_running(this))
            elif this.done() is None:
                with rundir.recorded(this.path, run.config.machine.dollars_per_hour):
                    _work(run, this, of, log, follower)
    follower.look()
    return record["result"]


def prerequisites(name: str, run: Run, of: str | None = None) -> list[str]:
    road = list(run.config.recipe.road)
    return [] if name == "report" else road[: road.index(of) + 1 if of else road.index(name)]


def _scored_model(name: str, run: Run, of: str | None) -> str | None:
    """The stage whose model ``eval`` scores, None for others; StageError for no such stage."""
    models = run.config.recipe.models
    if name not in config.STAGES:
        raise StageError(f"there is no stage {name!r}; there are {', '.join(config.STAGES)}")
    if name in config.MODELS and name not in models:
        without = f"run {run.id!r} has no stage {name}: it was made with {name}.enabled false"
        raise StageError(f"{without}; give --run NAME to begin one that has it")
    if name == "eval" and (not models or of not in (None, *models)):
        raise StageError(f"run {run.id!r} trains no model {of!r}; it has {', '.join(models)}")
    if name != "eval" and of is not None:
        raise StageError(f"only eval takes `of`, got stage {name!r} of {of!r}")
    return (of or models[-1]) if name == "eval" else None


class Follower:
    """Calls `watch` with a stage's metric rows when there are new ones, and when it is done."""

    def __init__(self, stages: Iterable[StageDir], watch: Watch | None) -> None:
        self._watch = watch
        self._seen = dict.fromkeys(stages, (0, False))  # bytes of metrics, done

    def follow(self, working: Callable[[], bool]) -> None:
        """Look again and again until `working` is false, and once after that."""
        while working():
            self.look()
            time.sleep(POLL)
        self.look()

    def look(self) -> None:
        if self._watch is None:
            return
        for stage, seen in self._seen.items():
            metrics = stage.metrics.path
            state = (metrics.stat().st_size if metrics.exists() else 0, stage.done() is not None)
            if state != seen:
                self._seen[stage] = state
                self._watch(stage, stage.metrics.rows())


def is_running(stage: StageDir) -> bool:
    return is_locked(stage.log)


def is_busy(run: Run) -> bool:
    return any(map(is_running, run.stages()))


def is_locked(path: Path) -> bool:
    with locked(path) if path.exists() else contextlib.nullcontext(path) as file:
        return file is None


@contextlib.contextmanager
def locked(path: Path) -> Generator[FileIO | None, None, None]:
    """The file open for appending and locked, or None while another process holds its lock."""
    with rundir.saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    with file:
        taken = None
        for wait in (0.05, 0):  # the other one may only be asking, as `is_running` does
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = file
                break
            time.sleep(wait)
        yield taken


def _work(run: Run, stage: StageDir, of: str | None, log: FileIO, follower: Follower) -> None:
    ranks = _ranks(run) if stage.name in PARALLEL else 1
    start = log.seek(0, os.SEEK_END)
    with rundir.saving(stage.log):
        log.write(f"--- {rundir.now()} {stage.name} on {ranks} rank(s)\n".encode())
    worker = subprocess.Popen(
        **_command(run, stage, of, ranks),
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=config.REPOSITORY,
        start_new_session=True,  # Ctrl-C in a terminal reaches only us
    )
    try:
        log.close()  # from here on the lock lives as long as the worker's processes
        follower.follow(lambda: worker.poll() is None)
    finally:
        _end(worker, stage)
    if stage.done() is None:
        raise _failure(stage, worker.returncode, start)


def _command(run: Run, stage: StageDir, of: str | None, ranks: int) -> dict[str, Any]:
    """The worker's command line and environment, with its share of the cores."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = run.config.machine.threads or max(1, cores // ranks)
    machine = config.flatten(run.config.machine, "machine.")
    machine |= {"machine.ranks": ranks, "machine.threads": threads}
    words = ["-m", WORKER, stage.name, str(run.path), "--machine", json.dumps(machine)]
    words += ["--of", of] if of else []
    if ranks > 1:
        # Without an address torchrun looks up this machine's host name, which need not resolve.
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        words = [*torchrun, f"--nproc-per-node={ranks}", *words]
    environment = {
        "NANOLIB_GUARD": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are ten times slower on a busy machine
        "PYTHONUNBUFFERED": "1",
    }
    return {"args": [sys.executable, *words], "env": os.environ | environment}


def _ranks(run: Run) -> int:
    """Without importing torch or touching a GPU."""
    machine, chosen = run.config.machine, os.environ.get("CUDA_VISIBLE_DEVICES")
    if machine.ranks is not None or machine.device not in ("auto", "cuda"):
        return machine.ranks or 1
    gpus = [device for device in (chosen or "").split(",") if device.strip() not in ("", "-1")]
    if chosen is None and shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        gpus = [line for line in listing.splitlines() if line.startswith("GPU ")]
    return max(1, len(gpus))


def _end(worker: subprocess.Popen, stage: StageDir) -> None:
    """Close the guard pipe (`nanolib.guard`) and wait for the last of the worker's processes."""
    assert worker.stdin is not None
    worker.stdin.close()
    try:
        worker.wait()
    except KeyboardInterrupt:  # a second one: do not wait for the save
        worker.kill()
        raise
    deadline = time.monotonic() + guard.GRACE + 5
    while stage.done() is None and is_running(stage) and time.monotonic() < deadline:
        pass  # ranks may outlive a killed torchrun for a moment; each look waits a little


def _failure(stage: StageDir, code: int, start: int) -> Exception:
    """What to raise for a worker that ended with `code`; its log begins at byte `start`."""
    lines = stage.log.read_bytes()[start:].decode(errors="replace").splitlines()
    mistakes = [line for line in lines if line.startswith("error: ")]
    torchrun_saw = any(re.search(r"exitcode\s*: 2\b", line) for line in lines)
    if mistakes and (code == 2 or torchrun_saw):
        return StageError(mistakes[-1].removeprefix("error: "))
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    tail = "\n".join([f"The end of {stage.log}:", *lines[-TAIL:]])
    again = "Run it again to go on from its last save."
    return WorkerError(f"stage {stage.name} did not finish ({how}). {again}\n{tail}")
