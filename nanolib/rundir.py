"""Run directories: ``runs/out/<id>/`` holds everything that belongs to a run.

    manifest.json           the recipe; written once
    <stage>/                done.json (exists once finished), metrics.jsonl (`Metrics`), log.txt
                            (locked while the stage runs), attempts.jsonl, checkpoints/
    eval/<stage>/           the same files, for the evaluation of that stage's model
    chapters/, report.md    executed notebooks, the report card

Every file has one writer. Files that must be complete are written to a draft, then renamed.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from nanolib import config
from nanolib.config import Config, Overrides

LATEST = "latest"  # symlink to the run opened last
MANIFEST = "manifest.json"
ATTEMPTS = "attempts.jsonl"


def runs_folder() -> Path:
    """``runs/out`` of the repository, or $NANOLIB_RUNS."""
    return Path(os.environ.get("NANOLIB_RUNS") or config.REPOSITORY / "runs" / "out")


def now() -> str:
    """The current UTC time as ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------------------- files


@contextlib.contextmanager
def saving(path: Path) -> Generator[None, None, None]:
    """Turn "disk full" errors, from any library, into a ValueError with a remedy."""
    try:
        yield
    except Exception as error:
        # OSError, safetensors and torch share this wording.
        if re.search("no space left on device|quota exceeded", str(error), re.IGNORECASE):
            remedy = "free some space and run the same command to go on"
            raise ValueError(f"the disk is full: {path} was not written; {remedy}") from error
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Generator[IO[bytes], None, None]:
    """Write a file atomically: `path` is replaced (and synced) only if the body succeeds."""
    draft = _draft(path)
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    """A name beside `path` that no other thread has, on whichever node that shares the disk."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{threading.get_native_id()}")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Generator[Path, None, None]:
    """Write a folder atomically: `folder` is replaced only if the body succeeds."""
    for abandoned in folder.parent.glob(f".{folder.name}.*"):  # left by a killed process
        shutil.rmtree(abandoned)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    with saving(folder):
        draft.mkdir(parents=True)
        yield draft
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)


def write_atomic(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Metrics:
    """A JSONL file of metrics with one writer and any number of readers.

    A row has ``step`` and ``kind`` ("train", "eval", "progress", "sample"). Only time, seconds,
    seconds_left and tokens_per_second vary between identical runs.
    """

    path: Path

    def append(self, **row: Any) -> None:
        """Append one row; readers see it immediately."""
        with saving(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                end = size = file.seek(0, os.SEEK_END)
                while end and file.seek(end - 1) >= 0 and file.read(1) != b"\n":
                    end -= 1  # drop a partial line left by a killed writer
                if end < size:
                    file.truncate(end)
                file.write(json.dumps(row).encode() + b"\n")

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All rows, or those of one kind; an incomplete last line is ignored."""
        if not self.path.is_file():
            return []
        *lines, _torn = self.path.read_bytes().split(b"\n")
        rows = map(json.loads, lines)
        return [row for row in rows if kind is None or row["kind"] == kind]

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed stage will write again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))


# ---------------------------------------------------------------------------- attempts


@contextlib.contextmanager
def recorded(folder: Path, dollars_per_hour: float | None) -> Generator[None, None, None]:
    """Record the body as one attempt at the work in `folder`, with its start and end time.

    A killed attempt is taken to have ended when a file in `folder` last changed.
    """
    rows = Metrics(folder / ATTEMPTS)
    if (before := rows.rows()) and before[-1]["ended"] is None:  # it was killed
        rows.append(**before[-1] | {"ended": _last_change(folder)})
    attempt = {"started": time.time(), "dollars_per_hour": dollars_per_hour}
    rows.append(**attempt, ended=None)
    try:
        yield
    finally:
        rows.append(**attempt, ended=time.time())


def spent(folder: Path, now: float | None = None) -> dict[str, Any]:
    """Attempts, seconds and dollars so far; an open attempt ends `now` (None: at the last change)."""
    seconds, dollars = 0.0, None
    attempts = {row["started"]: row for row in Metrics(folder / ATTEMPTS).rows()}
    for started, attempt in attempts.items():
        took = max(0.0, (attempt["ended"] or now or _last_change(folder)) - started)
        seconds += took
        if (price := attempt["dollars_per_hour"]) is not None:
            dollars = (dollars or 0.0) + took * price / 3600
    return {"attempts": len(attempts), "seconds": seconds, "dollars": dollars}


def _last_change(folder: Path) -> float:
    """Latest modification time in a folder, not counting the report and the attempts."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in (ATTEMPTS, "report.md")]
    return max((path.stat().st_mtime for path in files), default=0.0)


# ---------------------------------------------------------------------------- one stage


@dataclass(frozen=True)
class StageDir:
    name: str
    path: Path

    @property
    def of(self) -> str | None:
        """The stage whose model this evaluation scores; None for other stages."""
        return self.path.name if self.name == "eval" else None

    @property
    def metrics(self) -> Metrics:
        return Metrics(self.path / "metrics.jsonl")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def done(self) -> dict[str, Any] | None:
        """The done record, or None if the stage is not finished."""
        try:
            return json.loads((self.path / "done.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def curve(self) -> list[tuple[int, float]]:
        """The learning curve: (step, training loss), or (step, mean reward) for GRPO."""
        kind, key = ("rollout", "reward") if self.name == "grpo" else ("train", "loss")
        return [(row["step"], row[key]) for row in self.metrics.rows(kind)]

    def result(self) -> dict[str, Any]:
        return (self.done() or {"result": {}})["result"]

    def finish(self, result: Mapping[str, Any], **about: Any) -> None:
        """Write the done record; `about`: seconds, started, machine, cost."""
        record = {"result": dict(result), **about, "finished": now()}
        write_json(self.path / "done.json", record)


# ---------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Run:
    path: Path
    config: Config

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def name(self) -> str:
        """The name to pass to `load`: the id, or the path if outside the runs folder."""
        return self.id if self.path.parent == runs_folder().resolve() else str(self.path)

    @classmethod
    def open(cls, profile: str, run: str | None = None, overrides: Overrides = None) -> Run:
        """Open a run, creating it if needed; the same arguments open the same run.

        run: an id, or a path (relative to the repository) if it has a slash; None: the profile's
        name, plus a hash if `overrides` change the recipe. ValueError if the recipes differ.
        """
        this = cls.peek(profile, run, overrides)
        if not this.exists() and not _create(this, overrides):
            this = cls.peek(profile, run, overrides)  # another process was first
        link = runs_folder() / LATEST
        link.parent.mkdir(parents=True, exist_ok=True)
        draft = _draft(link)
        draft.unlink(missing_ok=True)
        draft.symlink_to(this.path)
        draft.replace(link)
        return this

    @classmethod
    def peek(cls, profile: str, run: str | None = None, overrides: Overrides = None) -> Run:
        """The run that `open` would return, with the same errors; writes nothing."""
        given, defaults = config.check_overrides(overrides), config.load_profile(profile)
        path = _locate(run or _default_id(profile, defaults, given))
        if path.name == LATEST:
            raise ValueError(f"{LATEST!r} is the run opened last; choose another --run NAME")
        if not (path / MANIFEST).exists():
            return cls(path, config.from_flat(profile, defaults | given))
        manifest = _read_manifest(path)
        if (made_with := manifest["profile"]) != profile:
            was_made = f"run {path.name!r} was made with profile = {made_with}, not {profile}"
            raise ValueError(f"{was_made}; start a new one with --run NAME")
        return cls._read(path, manifest, defaults | manifest["overrides"], given)

    @classmethod
    def load(cls, run: str | None = None, machine: Overrides = None) -> Run:
        """Load an existing run (None: the one opened last). `machine` overrides its profile's
        machine settings; ValueError if it changes the recipe."""
        path = _locate(run or LATEST).resolve()
        if not (path / MANIFEST).exists():
            lacks = f"no run {run!r} at {path}" if run else f"no run yet in {runs_folder()}"
            remedy = "list all: nanolib runs, make one: nanolib run demo"
            raise ValueError(f"there is {lacks} ({remedy})")
        manifest, given = _read_manifest(path), config.check_overrides(machine)
        profile = manifest["profile"]
        defaults = config.load_profile(profile) if profile in config.profiles() else {}
        machine_defaults = {k: v for k, v in defaults.items() if k.startswith("machine.")}
        return cls._read(path, manifest, machine_defaults, given)

    @classmethod
    def _read(cls, path: Path, manifest: dict, defaults: dict, given: dict) -> Run:
        """Build the run from its manifest; settings newer than the run get their defaults."""
        profile, recipe = manifest["profile"], manifest["recipe"]
        asked = config.from_flat(profile, recipe | defaults | given)
        saved = config.from_flat(profile, recipe).recipe
        for key, wanted, before in config.recipe_difference(asked.recipe, config.flatten(saved)):
            if key in given or key in recipe:
                made = f"run {path.name!r} was made with {key} = {before}, not {wanted}"
                remedy = f"restore profile {profile}, which changed"
                remedy = "leave it out" if key in given else remedy
                raise ValueError(f"{made}; {remedy}, or start a new one with --run NAME")
        return cls(path, replace(asked, recipe=saved))

    def exists(self) -> bool:
        return (self.path / MANIFEST).exists()

    def manifest(self) -> dict[str, Any]:
        return _read_manifest(self.path)

    def stage(self, name: str, of: str | None = None) -> StageDir:
        """A stage's directory; evaluations have one per model: ``stage("eval", of="sft")``."""
        return StageDir(name, self.path / name / of if of else self.path / name)

    def stages(self) -> list[StageDir]:
        stages = []
        for name in self.config.recipe.road:
            stages.append(self.stage(name))
            if name in config.MODELS:
                stages.append(self.stage("eval", name))
        return [*stages, self.stage("report")]

    def own(self) -> Path:
        """The user's own data as converted by the data stage."""
        return self.stage("data").path / "own"

    def text_mirror(self) -> Path:
        """The folder of the pretraining text."""
        return self.own() if self.config.recipe.data.text else self.mirror()

    def mirror(self) -> Path:
        """machine.mirror if set, else the mirror that the data stage used or filled."""
        stage = self.stage("data")
        recorded = stage.result().get("mirror") or stage.path / "mirror"
        return config.REPOSITORY / Path(self.config.machine.mirror or recorded).expanduser()


def _default_id(profile: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The profile's name, plus a hash of the overrides if they change the recipe."""
    plain = config.flatten(config.from_flat(profile, defaults).recipe)
    asked = config.flatten(given).items()
    changed = {path: value for path, value in asked if plain.get(path, value) != value}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return f"{profile}-{digest[:6]}" if changed else profile


def _locate(run: str) -> Path:
    if "/" in run:
        return (config.REPOSITORY / Path(run).expanduser()).resolve()
    if not re.fullmatch(r"\w[\w.-]*", run):
        raise ValueError(f"a run is a name (letters, digits, . _ -) or a path with /, got {run!r}")
    return runs_folder().resolve() / run


def _create(run: Run, overrides: Overrides) -> bool:
    """Write the manifest; False if another process created it first."""
    path = run.path
    if path.is_file() or (any(path.glob("[!.]*")) and not run.exists()):
        what = "a file, or a folder with other files and no manifest.json"
        raise ValueError(f"{path} is not a run: {what}; choose another --run NAME")
    recipe, given = config.flatten(run.config.recipe), config.check_overrides(overrides)
    given = {key: value for key, value in given.items() if key in recipe}
    about = {"profile": run.config.profile, "created": now(), "overrides": given}
    draft = _draft(path / f"{MANIFEST}.draft")
    write_json(draft, about | {"recipe": recipe})
    try:
        os.link(draft, path / MANIFEST)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        recipe = saved_recipe(manifest["recipe"], file)
        given = {key: recipe[key] for key in manifest["overrides"] if key in recipe}
        return manifest | {"recipe": recipe, "overrides": given}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "restore it, or start a new run with --run NAME"
        raise ValueError(f"{file} is damaged ({error}); {remedy}") from None


def saved_recipe(saved: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """A saved recipe checked by this version; warns about unknown settings and drops them."""
    if unknown := sorted(saved.keys() - config.settings().keys()):
        warn_once(f"{file} has settings unknown here, which are left out: {', '.join(unknown)}")
    recipe = {key: value for key, value in saved.items() if key not in unknown}
    return config.FIRST_EDITION | config.check_overrides(recipe)
