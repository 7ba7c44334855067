"""Kill a run at seeded times in all its stages; its results must not change.

    uv run nanolib bench faults --profile demo --kills 10 --seed 1

Runs the profile once undisturbed, and once while this script kills it: by turns Ctrl-C of the
command, and ``kill -9`` of the kernel, a training process or the whole command. After each kill no
process may survive, and the same command is started again. In the end results, metrics and weights
must equal the undisturbed run's bit for bit, except for times.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanolib import launch, rundir
from nanolib.progress import clock
from nanolib.rundir import Run, StageDir

if TYPE_CHECKING:
    import psutil

KINDS = ("ctrl-c", "kernel", "worker", "command")
TIMED = ("time", "seconds", "seconds_left", "tokens_per_second")  # values that depend on time
ROAD = (  # stage directories in the order a run fills them, those that train twice
    *("data", "tokenizer", "shards", "base", "base", "eval/base", "mid", "eval/mid"),
    *("sft", "eval/sft", "grpo", "grpo", "eval/grpo", "report"),
)


# ---------------------------------------------------------------------------- outcomes


def outcome(run: Run) -> dict[str, Any]:
    """All numbers of a finished run except times: results, metric rows, hashes of weights.

    The size of the code base is excluded too, since it may be edited between two runs.
    """
    found: dict[str, Any] = {}
    for place in run.stages():
        name, record = str(place.path.relative_to(run.path)), place.done()
        result = record and {key: item for key, item in record["result"].items() if key != "code"}
        rows = [row for row in place.metrics.rows() if row["kind"] != "progress"]
        found[name] = {
            "result": _timeless(result),
            "rows": _timeless(rows),
            "weights": _weights(place),
        }
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMED}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _weights(place: StageDir) -> dict[str, str] | None:
    """The hashes in the index of the latest checkpoint."""
    indices = sorted(place.checkpoints.glob("step_*/index.json"))
    return json.loads(indices[-1].read_text())["files"] if indices else None


def differences(mine: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """The differences of two outcomes, such as "sft/rows/3/loss: 2.5 != 2.4"."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys()):
            yield from differences(mine.get(key), theirs.get(key), f"{path}/{key}")
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for number, pair in enumerate(zip(mine, theirs, strict=True)):
            yield from differences(*pair, f"{path}/{number}")
    elif mine != theirs:
        yield f"{path[1:]}: {str(mine)[:80]} != {str(theirs)[:80]}"


# ---------------------------------------------------------------------------- killing


def kill(kind: str, command: subprocess.Popen) -> list[psutil.Process]:
    """End a running command in one of KINDS; returns the processes it had.

    Falls back to Ctrl-C if the kernel or worker to kill is not running at that moment.
    """
    import psutil

    family = psutil.Process(command.pid).children(recursive=True)
    words = {"kernel": "ipykernel", "worker": launch.WORKER}.get(kind)
    victims = [p for p in family if words and words in " ".join(command_line(p))]
    if kind == "command":
        command.kill()
    elif victims:
        victims[-1].kill()
    else:
        command.send_signal(signal.SIGINT)
    return family


def command_line(process: psutil.Process) -> list[str]:
    import psutil

    try:
        return process.cmdline()
    except psutil.Error:
        return []


def survivors(family: list[psutil.Process]) -> list[psutil.Process]:
    """The processes still running; zombies, which only wait to be reaped, do not count."""
    import psutil

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [process for process in family if runs(process)]


def wait(condition: Callable[[], Any], seconds: float, pause: float = 0.02) -> Any:
    """Wait for the condition; returns its first truthy value, or a falsy one on timeout."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
    return value


# ---------------------------------------------------------------------------- the long one


@dataclass(frozen=True)
class Kill:
    """One fault: its kind, and its time after the start of a stage."""

    kind: str
    place: str
    seconds: float


def plan(straight: Run, kills: int, seed: int) -> list[Kill]:
    """Kill times over all stages, each at a random fraction of the undisturbed stage's duration."""
    dice = random.Random(seed)
    chosen = sorted(round(number * len(ROAD) / kills) for number in range(kills))
    faults = []
    for number, where in enumerate(chosen):
        record = straight.stage(*ROAD[where].split("/")).done()
        lasts = record["seconds"] if record else 1.0
        share = lasts / ROAD.count(ROAD[where])  # a stage killed twice gets half for each
        faults.append(Kill(KINDS[number % len(KINDS)], ROAD[where], dice.uniform(0.1, 0.8) * share))
    return faults


def start(profile: str, run: Path, log: Path) -> subprocess.Popen:
    """Start `nanolib run` as a process, with its output in a file."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "nanolib", "run", profile, "--run", str(run)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def disturb(profile: str, folder: Path, faults: list[Kill], log: Path) -> Iterator[str]:
    """Run the profile in `folder` with all faults; yields a Markdown row for each."""
    for number, fault in enumerate(faults, 1):
        place = StageDir(fault.place, folder / fault.place)
        before = _finished(folder)
        command = start(profile, folder, log)
        began = wait(lambda p=place, c=command: launch.is_running(p) or c.poll() is not None, 3600)
        assert began and command.poll() is None, f"{fault} came too late, see {log}"
        time.sleep(fault.seconds)
        steps = len([row for row in place.metrics.rows() if row["kind"] == "train"])
        family = kill(fault.kind, command)
        killed = time.monotonic()
        command.wait()
        assert wait(lambda f=family: not survivors(f), 90), f"left behind: {survivors(family)}"
        quiet = time.monotonic() - killed
        unchanged = before.items() <= _finished(folder).items()
        assert unchanged, f"a finished stage ran again after {fault}"
        yield (
            f"| {number} | {fault.kind} | {fault.place}, {fault.seconds:.1f} s in"
            f"{f', step {steps}' if steps else ''} | {command.returncode} | {quiet:.1f} s |"
        )


def _finished(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in folder.glob("**/done.json")}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=rundir.runs_folder() / "faults")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    log, began = given.out / "log.txt", time.monotonic()
    code = start(given.profile, given.out / "straight", log).wait()
    assert code == 0, f"the undisturbed run failed, see {log}"
    straight = Run.load(str(given.out / "straight"))
    print(f"{given.profile}, undisturbed: {clock(time.monotonic() - began)}\n")
    print("| | killed | where | exit code | nobody left after |\n|---|---|---|---|---|")
    folder = given.out / f"killed-{given.seed}"
    for row in disturb(given.profile, folder, plan(straight, given.kills, given.seed), log):
        print(row, flush=True)
    code = start(given.profile, folder, log).wait()
    assert code == 0, f"the last command failed, see {log}"
    found = list(differences(outcome(straight), outcome(Run.load(str(folder)))))
    print("\n" + ("\n".join(found) or "results, metrics and weights equal the undisturbed run's"))
    sys.exit(1 if found else 0)
