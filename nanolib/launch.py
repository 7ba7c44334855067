"""Run a stage in processes of its own and watch it; whoever calls never trains.

    result = launch.stage("base", run)

runs what is missing before it, then starts ``python -m nanolib.stages.worker base DIR``, alone or under
torchrun, follows its metrics, and returns the result in its done record. Notebook, terminal,
laptop and eight GPUs share this one path.

Lock: the launcher locks ``<stage>/log.txt`` (flock) and hands it to the worker as standard
output. The lock belongs to the open file, so it is free only when the last rank has ended, also
when launcher or torchrun were killed. Guard: see `nanolib.guard`.
"""

from __future__ import annotations

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
from collections.abc import Callable, Generator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from nanolib import attempts, config, guard, rundir
from nanolib.rundir import Run, StageDir

WORKER: str = (
    "nanolib.stages.worker"  # the module that runs a stage: `python -m WORKER STAGE DIR …`
)
SHARED = (*config.MODELS, "eval")  # the stages that several ranks share
POLL = 0.2  # seconds between looks at a worker
TAIL = 30  # lines of the log that an error shows

Watch = Callable[[StageDir, Sequence[dict[str, Any]]], None]


class WorkerError(RuntimeError):
    """A stage's process ended without finishing; the message has the tail of its log."""


# ---------------------------------------------------------------------------- what runs


def stage(name: str, run: Run, of: str | None = None, watch: Watch | None = None) -> dict[str, Any]:
    """Bring a stage and what it needs to its end; the result of its done record.

    A finished stage returns at once; an interrupted one goes on where it was saved. If another
    process runs it, follow that one, and take over if it ends without finishing.

    of: whose model ``eval`` looks at; None: the last one of the run.
    watch: called with a stage's directory and its metric rows whenever they have grown, and once
    more when the stage is done.
    Raises ValueError for a user's mistake (here or in the worker), WorkerError when the worker
    fails, KeyboardInterrupt after the worker has saved.
    """
    name, of = check(name, run, of)
    for needed in before(name, run, of):
        if run.stage(needed).done() is None:
            stage(needed, run, watch=watch)
    place = run.stage(name, of)
    if name == "report" and _is_behind(place, run):
        (place.path / "done.json").unlink()
    follower = Follower(place, watch)
    while place.done() is None:
        with _locked(place.log) as log:
            if log is None:
                follower.look()
                time.sleep(POLL)
            elif place.done() is None:
                with attempts.recorded(place.path, run.config.machine.dollars_per_hour):
                    _work(run, place, of, log, follower)
    follower.look()
    record = place.done()
    assert record is not None
    return record["result"]


def _is_behind(report: StageDir, run: Run) -> bool:
    """Whether another stage has finished since the report card was written."""
    finished = [place for place in places(run) if place.done() and place.name != "report"]
    return report.done() is not None and any(
        (place.path / "done.json").stat().st_mtime_ns
        > (report.path / "done.json").stat().st_mtime_ns
        for place in finished
    )


def check(name: str, run: Run, of: str | None = None) -> tuple[str, str | None]:
    """The stage asked for, with `of` filled in; ValueError where there is no such stage."""
    enabled = run.config.recipe.models
    if name not in config.STAGES:
        raise ValueError(f"there is no stage {name!r}; there are {', '.join(config.STAGES)}")
    if name in config.MODELS and name not in enabled:
        raise ValueError(
            f"run {run.id!r} has no stage {name}: it was made with {name}.enabled false; "
            "give --run NAME to begin one that has it"
        )
    if name != "eval":
        if of is not None:
            raise ValueError(f"only eval takes `of`, got stage {name!r} of {of!r}")
        return name, None
    if not enabled or of not in (None, *enabled):
        raise ValueError(f"run {run.id!r} trains no model {of!r}; it has {', '.join(enabled)}")
    return name, of or enabled[-1]


def before(name: str, run: Run, of: str | None = None) -> list[str]:
    """The stages that must be finished before this one starts, in order."""
    if name == "report":
        return []
    road = ["data", "tokenizer", "shards", *run.config.recipe.models]
    return road[: road.index(of) + 1 if of else road.index(name)]


# ---------------------------------------------------------------------------- the worker


def _work(run: Run, place: StageDir, of: str | None, log: FileIO, follower: Follower) -> None:
    """Start the worker, follow it to its end, and raise what went wrong."""
    ranks = _ranks(run) if place.name in SHARED else 1
    command, environment = _command(run, place, of, ranks)
    start = log.seek(0, os.SEEK_END)
    with rundir.saving(place.log):
        log.write(f"--- {rundir.now()} {place.name} on {ranks} rank(s)\n".encode())
    worker = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=config.REPOSITORY,
        env=environment,
        start_new_session=True,  # Ctrl-C in a terminal reaches only us
    )
    try:
        log.close()  # from here on the lock lives as long as the worker's processes
        while worker.poll() is None:
            follower.look()
            time.sleep(POLL)
    finally:
        _end(worker, place)
    if place.done() is None:
        raise _failure(place, worker.returncode, start)


def _command(
    run: Run, place: StageDir, of: str | None, ranks: int
) -> tuple[list[str], dict[str, str]]:
    """The worker's command line and environment; its threads are pinned to its share of cores."""
    threads = run.config.machine.threads or max(1, _cores() // ranks)
    machine = config.flatten(run.config.machine, "machine.")
    machine |= {"machine.ranks": ranks, "machine.threads": threads}
    command = [sys.executable, "-m"]
    if ranks > 1:
        # All on this machine, whose own name need not be known to it.
        command += ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={ranks}", "-m"]
    command += [WORKER, place.name, str(run.path), "--machine", json.dumps(machine)]
    command += ["--of", of] if of else []
    environment = os.environ | {
        "NANOLIB_GUARD": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are ten times slower on a busy machine
        "PYTHONUNBUFFERED": "1",
    }
    return command, environment


def _ranks(run: Run) -> int:
    """Processes a stage runs on: machine.ranks, else one a GPU, else one."""
    machine = run.config.machine
    if machine.ranks is not None:
        return machine.ranks
    return max(1, _gpus()) if machine.device in ("auto", "cuda") else 1


def _gpus() -> int:
    """CUDA devices, counted without importing torch or touching one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([device for device in chosen.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _end(worker: subprocess.Popen, place: StageDir) -> None:
    """Close the guard pipe and wait until the last of the worker's processes has ended."""
    assert worker.stdin is not None
    worker.stdin.close()
    try:
        worker.wait()
    except KeyboardInterrupt:  # a second one: do not wait for the save
        worker.kill()
        raise
    deadline = time.monotonic() + guard.GRACE + 5
    while place.done() is None and time.monotonic() < deadline:
        with _locked(place.log) as log:  # ranks may outlive a killed torchrun for a moment
            if log is not None:
                return
        time.sleep(0.05)


def _failure(place: StageDir, code: int, start: int) -> Exception:
    """What to raise for a worker that ended with `code`; its log begins at byte `start`."""
    with place.log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    mistakes = [line for line in lines if line.startswith("error: ")]
    torchrun_saw = any(re.search(r"exitcode\s*: 2\b", line) for line in lines)
    if mistakes and (code == 2 or torchrun_saw):
        return ValueError(mistakes[-1].removeprefix("error: "))
    how = f"exit code {code}"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    tail = "\n".join(lines[-TAIL:])
    return WorkerError(
        f"stage {place.name} did not finish ({how}). Running it again goes on where it was saved.\n"
        f"The end of {place.log}:\n{tail}"
    )


# ---------------------------------------------------------------------------- lock and metrics


@contextlib.contextmanager
def _locked(path: Path) -> Generator[FileIO | None, None, None]:
    """The file open for appending and locked, or None while another process has it."""
    with rundir.saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab", buffering=0)
    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield log


def is_running(place: StageDir) -> bool:
    """Whether some process works on this stage now."""
    if not place.log.exists():
        return False
    with _locked(place.log) as log:
        return log is None


def places(run: Run) -> list[StageDir]:
    """The directories of all stages that were ever started, in the order of the road."""
    folders = [("eval", path) for path in sorted((run.path / "eval").glob("*"))]
    folders += [(name, run.path / name) for name in config.STAGES if name != "eval"]
    folders.sort(key=lambda folder: config.STAGES.index(folder[0]))
    return [StageDir(name, path) for name, path in folders if path.is_dir()]


def wait_until_idle(run: Run) -> None:
    """Return when no process works on any of the run's stages."""
    while any(is_running(place) for place in places(run)):
        time.sleep(0.1)


class Follower:
    """Calls `watch` with a stage's rows when there are new ones, and when it is done."""

    def __init__(self, place: StageDir, watch: Watch | None) -> None:
        self.place, self.watch = place, watch
        self._seen = (0, 0, False)

    def look(self) -> None:
        if self.skip() and self.watch is not None:
            self.watch(self.place, self.place.metrics.rows())

    def skip(self) -> bool:
        """Count everything so far as seen; whether any of it was new."""
        before, done, metrics = self._seen, self.place.done(), self.place.metrics.path
        status = metrics.stat() if metrics.exists() else None
        size, modified = (status.st_size, status.st_mtime_ns) if status else (0, 0)
        self._seen = (size, modified, done is not None)
        return self._seen != before
