"""A stand-in for the worker: counts instead of training, and fails on request.

    python -m tests.fake_stages STAGE DIR [--of M] [--machine JSON]

$FAKE says how, for the stage it names ("base:crash") or for all: ok, mistake, crash, die, hang.
$FAKE_SLEEP is the seconds that a step takes, in the stage it names ("base:0.1") or in all.
The count is saved only when asked to stop, so that a kill loses steps as a real one would.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import nanolib.guard
from nanolib.guard import Guard
from nanolib.rundir import Run, write_atomic

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("dir")
    parser.add_argument("--of")
    parser.add_argument("--machine")
    args = parser.parse_args()
    stage, _, how = os.environ.get("FAKE", "ok").rpartition(":")
    slow, _, pause = os.environ.get("FAKE_SLEEP", "0").rpartition(":")
    nanolib.guard.GRACE = 1.0
    guard = Guard.start()
    place = Run.load(args.dir).stage(args.stage, args.of)
    if stage in ("", args.stage):
        fail(how)
    count(place, guard, json.loads(args.machine), float(pause) if slow in ("", args.stage) else 0)


def fail(how: str) -> None:
    if how == "mistake":
        print("Traceback: for the log only\nerror: depth must be at least 1, got 0")
        sys.exit(2)
    if how == "crash":
        raise RuntimeError("something broke here")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        print("hanging", flush=True)
        time.sleep(600)


def count(place, guard: Guard, machine: dict, pause: float) -> None:
    rank, saved = int(os.environ.get("RANK", 0)), place.path / "saved.json"
    first = json.loads(saved.read_text()) if saved.exists() else 0
    if rank == 0:
        with Path(place.path / "starts").open("a") as file:
            file.write(f"{first}\n")
        place.metrics.truncate(first)
    for step in range(first + 1, STEPS + 1):
        time.sleep(pause)
        if rank == 0:
            place.metrics.append(step=step, kind="train", loss=1 / step, steps=STEPS)
        if guard.stop_requested:
            if rank == 0:
                write_atomic(saved, str(step))
            return
    if rank == 0:
        about = {key: machine[f"machine.{key}"] for key in ("ranks", "threads")}
        about["omp"] = int(os.environ["OMP_NUM_THREADS"])
        place.finish({"steps": STEPS, "started": first}, machine=about)


if __name__ == "__main__":
    main()
