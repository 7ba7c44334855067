"""How long a piece of work took, all attempts together.

An attempt is a row in ``<folder>/attempts.jsonl``, written when it begins and again when it ends:
of rows with the same ``started``, the last one counts. Where the process that records was killed
there is no second row, and the attempt counts until a file in its folder last changed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from nanolib.rundir import Metrics

FILE = "attempts.jsonl"


@contextlib.contextmanager
def recorded(folder: Path, dollars_per_hour: float | None) -> Generator[None, None, None]:
    """Record the body as one attempt at the work in `folder`."""
    rows = Metrics(folder / FILE)
    for attempt in _attempts(folder):
        if attempt["ended"] is None:
            rows.append(**attempt | {"ended": _last_change(folder)})
    attempt = {"started": time.time(), "dollars_per_hour": dollars_per_hour}
    rows.append(**attempt, ended=None)
    try:
        yield
    finally:
        rows.append(**attempt, ended=time.time())


def spent(folder: Path, now: float | None = None) -> dict[str, Any]:
    """Attempts, seconds and dollars of the work in `folder`; dollars are None without a price.

    now: the end of an attempt under way, in Unix seconds; None: the folder's last change.
    """
    took, dollars = [], []
    for attempt in _attempts(folder):
        ended = attempt["ended"] or now or _last_change(folder)
        took.append(max(0.0, ended - attempt["started"]))
        if attempt["dollars_per_hour"] is not None:
            dollars.append(attempt["dollars_per_hour"] * took[-1] / 3600)
    total = sum(dollars) if dollars else None
    return {"attempts": len(took), "seconds": sum(took), "dollars": total}


def _attempts(folder: Path) -> list[dict[str, Any]]:
    """The last row of each attempt."""
    return list({row["started"]: row for row in Metrics(folder / FILE).rows()}.values())


def _last_change(folder: Path) -> float:
    """When the work last wrote a file; the report card and the attempts are not work."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in (FILE, "report.md")]
    return max((path.stat().st_mtime for path in files), default=0.0)
