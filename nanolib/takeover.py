"""Start a run from the finished stages of another with the same recipe: ``--from RUN``.

Stages are copied up to the first one whose settings differ (`config.up_to`), that the other run has
not finished, or that this run has started. The data stage always runs; its fingerprint shows
whether both runs read the same files. Large files, never modified in place, become hard links.
"""

import contextlib
import fcntl
import os
import shutil

from nanolib import config, launch
from nanolib.rundir import Run, StageDir, whole_folder, write_json

LINKED = (".safetensors", ".npy")


def take_over(run: Run, source: Run, watch: launch.Watch | None = None) -> list[str]:
    """Copy the stages of `source` that `run` would repeat; returns messages for the user."""
    if run.path.resolve() == source.path.resolve():
        raise ValueError(f"run {run.name} cannot take over its own stages: give --run or --from")
    launch.stage("data", run, watch=watch)
    taken = []
    with (run.path / "manifest.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one process copies; released if killed
        for name in run.config.recipe.road:
            if obstacle := _obstacle(run, source, name):
                break
            if name == "data":
                continue
            taken.append(name)
            _copy(source.stage(name), run.stage(name), source.name)
            scores = source.stage("eval", of=name)
            if scores.done() and run.config.recipe.eval == source.config.recipe.eval:
                taken.append(f"eval of {name}")
                _copy(scores, run.stage("eval", of=name), source.name)
    messages = [f"taken over from run {source.name}: {', '.join(taken) or 'nothing'}"]
    return [*messages, f"{name} is not taken over: {obstacle}"] if obstacle else messages


def _obstacle(run: Run, source: Run, name: str) -> str | None:
    """Why a stage cannot be taken over; None if it can be, or already was."""
    theirs = config.up_to(source.config.recipe, name)
    for path, value in config.up_to(run.config.recipe, name).items():
        if theirs[path] != value:
            return f"{path} is {config.as_text(theirs[path])} there, {config.as_text(value)} here"
    if source.stage(name).done() is None:
        return f"run {source.name} has not finished it"
    here, there = run.stage("data").result(), source.stage("data").result()
    if here["fingerprint"] != there["fingerprint"]:
        return f"run {source.name} has read other files"
    if name in config.MODELS[1:]:
        # The text may have a new revision: the equal fingerprints show that its files are the same.
        revisions, others = here.get("revisions", {}), there.get("revisions", {})
        both = revisions.keys() & others.keys() - {run.config.recipe.data.repository}
        if changed := sorted(it for it in both if revisions[it] != others[it]):
            return f"{', '.join(changed)} has another revision there"
        if here.get("own", {}) != there.get("own", {}):
            return "your own data (data.conversations) is another there"
    begun = name != "data" and run.stage(name).path.exists()
    if begun and run.stage(name).done() != _record(source.stage(name), source.name):
        return "it was begun here before"
    return None


def _copy(theirs: StageDir, mine: StageDir, origin: str) -> None:
    if mine.path.exists():
        return
    with whole_folder(mine.path) as draft:
        ignored = shutil.ignore_patterns(".*", "*.partial")
        shutil.copytree(
            theirs.path, draft, ignore=ignored, copy_function=_link_or_copy, dirs_exist_ok=True
        )
        write_json(draft / "done.json", _record(theirs, origin))


def _record(theirs: StageDir, origin: str) -> dict:
    return (theirs.done() or {}) | {"taken_over": origin}


def _link_or_copy(file: str, target: str) -> None:
    if file.endswith(LINKED):
        with contextlib.suppress(OSError):  # other file system, or no hard links
            os.link(file, target)
            return
    shutil.copy2(file, target)
