"""Fills a mirror from the hub, for `nanolib mirror` and for runs without a mirror of their own.

``manifest.json`` records each repository's revision and each file's length and SHA-256; a file is
moved or linked into place only after both have been checked.
"""

import json
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from nanolib import hub
from nanolib.config import Config
from nanolib.progress import clock
from nanolib.rundir import write_json

MANIFEST, BUNDLE = "manifest.json", "eval_bundle.zip"
AT_ONCE = 8  # concurrent downloads
PAUSES = 2, 8, 30  # seconds before each retry of a failed download

Splits = Sequence[hub.Split]  # data set splits that a run reads


def fill(config: Config, splits: Splits, folder: Path, progress: hub.Progress, link: bool) -> dict:
    """Fetch all missing or changed files (`link`: as links to the hub cache, shared by runs).

    Returns {repository: revision (commit hash)}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(folder, progress, link)
    for group in hub.wanted(config, splits, folder, mirror.manifest["revisions"]):
        mirror.get(group)
    if config.recipe.eval.core_problems != 0:
        progress(0, 1, "the evaluation bundle")
        mirror.put(BUNDLE, [hub.fetch_bundle(None if link else folder / BUNDLE)])
    for number, name in enumerate(() if link else hub.ENCODINGS):
        progress(number, len(hub.ENCODINGS), f"the encoding {name}")
        mirror.put(f"encodings/{name}.tiktoken", [hub.fetch_encoding(name, folder)])
    write_json(folder / MANIFEST, mirror.manifest | {"finished": True})
    shutil.rmtree(folder / ".parts", ignore_errors=True)
    return mirror.manifest["revisions"]


def check(config: Config, splits: Splits, folder: Path) -> list[str]:
    """Problems of a mirror, one line per file; works offline."""
    mirror = Mirror(folder)
    names = {*mirror.manifest["files"], *map(hub.table_path, splits)}
    names |= {BUNDLE} if config.recipe.eval.core_problems != 0 else set()
    found = {folder / name: mirror.problem(name) for name in sorted(names)}
    if not mirror.manifest["finished"]:
        found[folder] = "is not finished: fetch again to go on"
    return [f"{path} {problem}" for path, problem in found.items() if problem]


class Mirror:
    """A mirror folder, filled by a thread pool."""

    def __init__(self, folder: Path, progress: hub.Progress = print, link: bool = False):
        self.folder, self.progress, self.link = folder, progress, link
        self.manifest: dict[str, Any] = {"revisions": {}, "files": {}, "finished": False}
        if (path := folder / MANIFEST).exists():
            self.manifest = json.loads(path.read_text())
        self.lock, self.stop, self.received = threading.Lock(), threading.Event(), 0

    def problem(self, name: str) -> str:
        """Why a file cannot be used; empty if it matches its record."""
        if not (self.folder / name).is_file():
            return "is missing"
        if name not in self.manifest["files"]:
            return f"is not in {MANIFEST}"
        return hub.difference(self.folder / name, **self.manifest["files"][name])

    def get(self, group: hub.Wanted) -> None:
        """Fetch a group of files; the first error, or Ctrl-C, stops all downloads."""
        missing = [it for name in group if not (self.folder / name).exists() for it in group[name]]
        total, free = sum(it.length or 0 for it in missing), shutil.disk_usage(self.folder).free
        if total > free and not self.link:
            lack = f"needs {total:,} bytes more and has {free:,} free"
            raise ValueError(f"{self.folder} {lack}: free some space or choose another folder")
        self.received, began = 0, time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            left = {pool.submit(self._fetch, *item) for item in group.items()}
            try:
                while left:
                    self.progress(self.received, total, self._describe(total, began))
                    done, left = wait(left, 0.2, FIRST_EXCEPTION)
                    for job in done:
                        job.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _describe(self, total: int, began: float) -> str:
        speed = self.received / max(time.monotonic() - began, 0.001)
        size = f"{self.received / 1e6:,.0f}/{total / 1e6:,.0f} MB  {speed / 1e6:.1f} MB/s"
        return f"{size}  {clock(max(0, total - self.received) / speed)} left" if speed else size

    def _fetch(self, name: str, files: Sequence[hub.Remote]) -> None:
        folder = None if self.link else self.folder / ".parts" / files[0].repository
        for pause in (*PAUSES, None):
            try:
                if self.problem(name):
                    self.put(name, [hub.fetch_file(it, folder, self._meter()) for it in files])
                return
            except ValueError:
                if pause is None or self.stop.wait(pause):
                    raise

    def _meter(self) -> type:
        """A silent progress bar class, through which huggingface_hub reports received bytes."""
        from huggingface_hub.utils import disable_progress_bars, tqdm

        def update(_: Any, n: float | None = 1) -> None:
            self.received += int(n or 0)
            if self.stop.is_set():
                raise KeyboardInterrupt

        disable_progress_bars()
        return type("Meter", (tqdm,), {"update": update})

    def put(self, name: str, parts: Sequence[Path]) -> None:
        """Move a file into place and record it in the manifest."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if len(parts) > 1:
            hub.join(parts, target)
        elif self.link:
            target.symlink_to(parts[0])
        else:
            parts[0].replace(target)
        about = {"length": target.stat().st_size, "sha256": hub.digest(target)}
        with self.lock:
            self.manifest["files"][name] = about
            write_json(self.folder / MANIFEST, self.manifest | {"finished": False})
