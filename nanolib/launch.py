"""Runs a stage in worker processes and follows its progress; the caller itself never trains.

The launcher locks ``<stage>/log.txt`` (flock) and passes it to the workers as standard output. The
lock belongs to the open file, so it is held until the last rank exits, even if the launcher or
torchrun is killed.
"""

import contextlib
import fcntl
import json
import math
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
POLL = 0.2  # seconds between checks of a running stage
TAIL = 30  # log lines shown in an error
QUIET = 60.0  # seconds without a row before a stage counts as silent

Watch = Callable[[StageDir, Sequence[dict[str, Any]]], None]


class StageError(ValueError):
    """A stage cannot run or finish because of a user error."""


class WorkerError(RuntimeError):
    """A worker ended before its stage was finished; the message has the end of its log."""


def stage(name: str, run: Run, of: str | None = None, watch: Watch | None = None) -> dict[str, Any]:
    """Run a stage, and any unfinished stages it needs; returns its result (from done.json).

    of: the stage whose model ``eval`` scores; None: the run's last. watch: see `Follower`. If
    another process is running the stage, follow it, and take over if it ends early. Raises
    StageError for user errors, WorkerError if the worker fails, KeyboardInterrupt after saving.
    """
    of = _scored_model(name, run, of)
    for needed in prerequisites(name, run, of):
        if run.stage(needed).done() is None:
            stage(needed, run, watch=watch)
    this, number = run.stage(name, of), node(run.config.machine)[0]
    if name == "report" and this.done() and not number:
        finished = {it: (it.path / "done.json").stat() for it in run.stages() if it.done()}
        if this != max(finished, key=lambda it: finished[it].st_mtime_ns):
            (this.path / "done.json").unlink()  # outdated: a stage has finished since
    follower = Follower([this], watch)
    path = this.path / f"log_{number}.txt" if number else this.log
    while (record := this.done()) is None:
        if number and not (name in PARALLEL and is_running(this)):  # node 0 begins, or works alone
            follower.look()
            time.sleep(POLL)
            continue
        attempt = rundir.recorded(this.path, run.config.machine.dollars_per_hour)
        with locked(path) as log:
            if log is None:
                follower.follow(lambda: is_locked(path))
            elif this.done() is None:
                with contextlib.nullcontext() if number else attempt:
                    _work(run, this, log, follower)
                follower.follow(lambda: this.done() is None and is_running(this))
    follower.look()
    return record["result"]


def prerequisites(name: str, run: Run, of: str | None = None) -> list[str]:
    road = list(run.config.recipe.road)
    return [] if name == "report" else road[: road.index(of) + 1 if of else road.index(name)]


def node(machine: config.MachineConfig) -> tuple[int, str]:
    """This node's number and where the nodes meet, from the environment if there are several."""
    number, address = (os.environ.get(f"NANOLIB_{it}", "") for it in ("NODE", "RENDEZVOUS"))
    if machine.nodes == 1:
        return 0, ""
    if number not in map(str, range(machine.nodes)) or not re.fullmatch(r"\S+:\d+", address):
        wants = f"NANOLIB_NODE = 0 to {machine.nodes - 1}, another on each node, got {number!r}"
        wants += f", and NANOLIB_RENDEZVOUS = HOST:PORT of node 0, got {address!r}"
        raise StageError(f"machine.nodes = {machine.nodes} needs {wants}; see runs/launch/")
    return int(number), address


def _scored_model(name: str, run: Run, of: str | None) -> str | None:
    """The stage whose model ``eval`` scores (None for other stages); checks both names."""
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
    """Calls `watch` with all metric rows of a stage when there are new ones or it finishes.

    Also once a minute while a running stage is silent for longer than its own pace explains; the
    last row then is of kind "silent" and has the seconds.
    """

    def __init__(self, stages: Iterable[StageDir], watch: Watch | None) -> None:
        self._watch = watch
        self._seen = dict.fromkeys(stages, (0, False, 0))  # bytes of metrics, done, silent minutes
        self._changed = dict.fromkeys(self._seen, math.inf)  # when a row was last written
        self._pause = dict.fromkeys(self._seen, 0.0)  # the longest between rows, in seconds

    def follow(self, working: Callable[[], bool]) -> None:
        """Poll until `working()` is false, then once more."""
        while working():
            self.look()
            time.sleep(POLL)
        self.look()

    def look(self) -> None:
        if self._watch is None:
            return
        for stage, seen in self._seen.items():
            metrics, done = stage.metrics.path, stage.done() is not None
            size = metrics.stat().st_size if metrics.exists() else 0
            silent = 0.0 if done else self._silence(stage)
            if (state := (size, done, int(silent // QUIET))) != seen:
                self._seen[stage], rows = state, stage.metrics.rows()
                steps = (row.get("seconds", 0.0) for row in rows)
                self._pause[stage] = max([self._pause[stage], *steps])
                if silent > 2 * self._pause[stage]:
                    rows.append({"kind": "silent", "seconds": silent})
                self._watch(stage, rows)

    def _silence(self, stage: StageDir) -> float:
        """Seconds since the last row or the start of a running stage; 0 if its pace explains them."""
        files = (stage.metrics.path, stage.path / rundir.ATTEMPTS)
        written, started = (it.stat().st_mtime if it.exists() else 0.0 for it in files)
        pause = written - max(started, self._changed[stage])  # negative if there is no new row
        self._changed[stage] = written or math.inf
        self._pause[stage] = max(pause, self._pause[stage])
        silent = time.time() - (max(written, started) or time.time())
        explained = silent < max(QUIET, 2 * self._pause[stage]) or not is_running(stage)
        return 0.0 if explained else silent


def is_running(stage: StageDir) -> bool:
    return is_locked(stage.log)


def is_busy(run: Run) -> bool:
    return any(map(is_running, run.stages()))


def is_locked(path: Path) -> bool:
    with locked(path) if path.exists() else contextlib.nullcontext(path) as file:
        return file is None


@contextlib.contextmanager
def locked(path: Path) -> Generator[FileIO | None, None, None]:
    """Open a file for appending and lock it; yields None if another process holds the lock."""
    with rundir.saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    with file:
        taken = None
        for wait in (0.05, 0):  # `is_running` elsewhere may hold it for a moment
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = file
                break
            time.sleep(wait)
        yield taken


def _work(run: Run, stage: StageDir, log: FileIO, follower: Follower) -> None:
    ranks, path = _ranks(run) if stage.name in PARALLEL else 1, Path(str(log.name))
    start = log.seek(0, os.SEEK_END)
    with rundir.saving(path):
        log.write(f"--- {rundir.now()} {stage.name} on {ranks} rank(s)\n".encode())
    worker = subprocess.Popen(
        **_command(run, stage, ranks),
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=config.REPOSITORY,
        start_new_session=True,  # so that Ctrl-C reaches only the launcher
    )
    try:
        log.close()  # now only the worker processes hold the lock
        follower.follow(lambda: worker.poll() is None)
    finally:
        _end(worker, stage, path)
    if stage.done() is None and (worker.returncode or path == stage.log):
        raise _failure(stage, path, worker.returncode, start)


def _command(run: Run, stage: StageDir, ranks: int) -> dict[str, Any]:
    """The worker's command line and environment."""
    affinity = getattr(os, "sched_getaffinity", None)  # missing on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = run.config.machine.threads or max(1, cores // ranks)
    machine = config.flatten(run.config.machine, "machine.")
    machine |= {"machine.ranks": ranks, "machine.threads": threads}
    words = ["-m", WORKER, stage.name, str(run.path), "--machine", json.dumps(machine)]
    words += ["--of", stage.of] if stage.of else []
    environment = {
        "NANOLIB_GUARD": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # busy-waiting is ten times slower on a busy machine
        "PYTHONUNBUFFERED": "1",
    }
    args = [sys.executable, *_torchrun(run, stage, ranks), *words]
    return {"args": args, "env": os.environ | environment}


def _torchrun(run: Run, stage: StageDir, ranks: int) -> list[str]:
    """What starts `ranks` workers on each node that the stage runs on; nothing for a single one."""
    nodes = run.config.machine.nodes if stage.name in PARALLEL else 1
    if ranks * nodes == 1:
        return []
    # By default torchrun uses this machine's host name, which may not resolve.
    meeting = ["--standalone", "--local-addr=127.0.0.1"]
    if nodes > 1:
        number, address = node(run.config.machine)
        meeting = [f"--nnodes={nodes}", f"--rdzv-id={run.id}-{stage.name}", "--rdzv-backend=c10d"]
        meeting += [f"--rdzv-endpoint={address}", f"--rdzv-conf=is_host={not number}"]
        meeting += [] if number else [f"--local-addr={address.rpartition(':')[0]}"]
    return ["-m", "torch.distributed.run", *meeting, f"--nproc-per-node={ranks}"]


def _ranks(run: Run) -> int:
    """Number of ranks, found without importing torch or touching a GPU."""
    machine, chosen = run.config.machine, os.environ.get("CUDA_VISIBLE_DEVICES")
    if machine.ranks is not None or machine.device not in ("auto", "cuda"):
        return machine.ranks or 1
    gpus = [device for device in (chosen or "").split(",") if device.strip() not in ("", "-1")]
    if chosen is None and shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        gpus = [line for line in listing.splitlines() if line.startswith("GPU ")]
    return max(1, len(gpus))


def _end(worker: subprocess.Popen, stage: StageDir, log: Path) -> None:
    """Close the guard pipe (see `nanolib.guard`) and wait for all worker processes."""
    assert worker.stdin is not None
    worker.stdin.close()
    try:
        worker.wait()
    except KeyboardInterrupt:  # second Ctrl-C: do not wait for the save
        worker.kill()
        raise
    deadline = time.monotonic() + guard.GRACE + 5
    while stage.done() is None and is_locked(log) and time.monotonic() < deadline:
        time.sleep(POLL)  # ranks may briefly outlive a killed torchrun


def _failure(stage: StageDir, log: Path, code: int, start: int) -> Exception:
    """The exception for a worker that exited with `code`; its log starts at byte `start`."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    mistakes = [line for line in lines if line.startswith("error: ")]
    torchrun_saw = any(re.search(r"exitcode\s*: 2\b", line) for line in lines)
    if mistakes and (code == 2 or torchrun_saw):
        return StageError(mistakes[-1].removeprefix("error: "))
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    tail = "\n".join([f"The end of {log}:", *lines[-TAIL:]])
    again = "Run it again to go on from its last save."
    return WorkerError(f"stage {stage.name} did not finish ({how}). {again}\n{tail}")
