"""``nanolib runs``: a table of all runs."""

import contextlib
import datetime
from pathlib import Path

from nanolib import launch, rundir
from nanolib.rundir import Run

HEADER = ("run", "profile", "finished", "next", "size", "last change")


def table() -> str:
    found = {path.parent.resolve() for path in rundir.runs_folder().glob("*/manifest.json")}
    lines = sorted(map(_line, found), key=lambda line: line[-1], reverse=True)
    if not lines:
        return f"there is no run yet in {rundir.runs_folder()}; make one: nanolib run demo"
    widths = [max(map(len, column)) for column in zip(HEADER, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [HEADER, *lines]
    )


def _line(path: Path) -> tuple[str, ...]:
    total, changed = 0, 0.0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a running stage renames and deletes files
            status = file.lstat()
            total += status.st_size
            changed = max(changed, status.st_mtime)
    when = datetime.datetime.fromtimestamp(changed).isoformat(" ", timespec="minutes")
    size = f"{total / 1e6:,.1f} MB"
    try:
        run = Run.load(str(path))
    except ValueError:
        return path.name, "?", "its manifest.json cannot be read", "?", size, when
    road = run.config.recipe.road
    done = [name for name in road if run.stage(name).done()]
    left = [name for name in [*road, "report"] if not run.stage(name).done()]
    upcoming = f"{left[0]}{' (running)' * launch.is_running(run.stage(left[0]))}" if left else "-"
    progress = f"{done[-1] if done else '-'} ({len(done)} of {len(road)})"
    return run.name, run.config.profile, progress, upcoming, size, when
