"""A run begins with another run's finished stages where their recipe is the same.

    nanolib run demo --grpo.lr 0.2 --from demo

Stages are taken over from the first on, until one whose settings differ (`config.up_to`), that the
other run has not finished, or that this run has begun by itself. The data stage always runs here:
it is short, and its fingerprint says whether both runs read the same files. Large files are hard
links where the file system has them: they are never written in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from nanolib import config, launch
from nanolib.rundir import Run, StageDir, saving, write_json

LINKED = (".safetensors", ".npy")


def take_over(run: Run, source: Run, watch: launch.Watch | None = None) -> list[str]:
    """Copy the stages of `source` that `run` would compute again; what was done, in sentences.

    A stage's directory appears whole or not at all, and its done record says where it is from.
    Raises ValueError where `source` is the run itself, and whatever the data stage raises.
    """
    if run.path.resolve() == source.path.resolve():
        raise ValueError(f"run {run.name} cannot take over its own stages: give --run or --from")
    taken, obstacle = [], None
    for name in ("data", "tokenizer", "shards", *run.config.recipe.models):
        obstacle = _obstacle(run, source, name)
        if name == "data" and obstacle is None:
            obstacle = _other_data(run, source, watch)
        if obstacle is not None:
            break
        if name != "data":
            taken += _take_stage(run, source, name)
    said = [f"taken over from run {source.name}: {', '.join(taken) or 'nothing'}"]
    return said if obstacle is None else [*said, f"{name} is not taken over: {obstacle}"]


def _obstacle(run: Run, source: Run, name: str) -> str | None:
    """Why a stage cannot be taken over; None where it can, or was."""
    mine = config.up_to(run.config.recipe, name)
    theirs = config.up_to(source.config.recipe, name)
    for path, value in mine.items():
        if theirs[path] != value:
            return f"{path} is {config.as_text(theirs[path])} there, {config.as_text(value)} here"
    if source.stage(name).done() is None:
        return f"run {source.name} has not finished it"
    if name in config.MODELS[1:] and (changed := _other_revisions(run, source)):
        return f"{', '.join(changed)} has another revision there"
    begun = name != "data" and run.stage(name).path.exists()
    if begun and run.stage(name).done() != _record(source, source.stage(name)):
        return "it was begun here before"
    return None


def _other_data(run: Run, source: Run, watch: launch.Watch | None) -> str | None:
    """Do the data stage here; an obstacle where it found other files than `source` did."""
    mine = launch.stage("data", run, watch=watch)["fingerprint"]
    record = source.stage("data").done()
    is_same = record is not None and record["result"]["fingerprint"] == mine
    return None if is_same else f"run {source.name} has read other files"


def _other_revisions(run: Run, source: Run) -> list[str]:
    """Data sets on the hub that have changed between the two runs' data stages.

    Text does not count: it may have a new revision and the same files, see `_other_data`.
    """
    records = (it.stage("data").done() or {"result": {}} for it in (run, source))
    mine, theirs = (record["result"].get("revisions", {}) for record in records)
    both = mine.keys() & theirs.keys() - {run.config.recipe.data.repository}
    return sorted(name for name in both if mine[name] != theirs[name])


def _take_stage(run: Run, source: Run, name: str) -> list[str]:
    """Copy one stage and the evaluation of its model, if there are such; what they are called."""
    wanted = [(name, source.stage(name), run.stage(name))]
    evaluation = source.stage("eval", of=name)
    if evaluation.done() and run.config.recipe.eval == source.config.recipe.eval:
        wanted.append((f"eval of {name}", evaluation, run.stage("eval", of=name)))
    for _, theirs, mine in wanted:
        with _locked(run):
            if not mine.path.exists():
                _copy(source, theirs, mine.path, draft=run.path / ".taken")
    return [called for called, *_ in wanted]


def _copy(source: Run, theirs: StageDir, target: Path, draft: Path) -> None:
    with saving(target):
        shutil.rmtree(draft, ignore_errors=True)  # of a copy that was killed
        target.parent.mkdir(exist_ok=True)
        ignored = shutil.ignore_patterns(".*", "*.partial")
        shutil.copytree(theirs.path, draft, copy_function=_link_or_copy, ignore=ignored)
        write_json(draft / "done.json", _record(source, theirs))
        draft.rename(target)


def _record(source: Run, theirs: StageDir) -> dict:
    return (theirs.done() or {}) | {"taken_over": source.name}


def _link_or_copy(file: str, target: str) -> None:
    if file.endswith(LINKED):
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(file, target)
            return
    shutil.copy2(file, target)


@contextlib.contextmanager
def _locked(run: Run) -> Generator[None, None, None]:
    """Only one process at a time copies into a run; a killed one lets go."""
    folder = os.open(run.path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
