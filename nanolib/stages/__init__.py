"""The stages of the road: each assembles its parts, works, and leaves a done record.

    data → tokenizer → shards → base → mid → sft → grpo → eval → report

`text` has the first three, `training` those that leave a model, `evaluate` the scores; `worker` is
the process that `nanolib.launch` starts. Readers and tests may call the functions themselves.
Every stage can be stopped and killed at any instant and goes on from what it had saved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from nanolib.guard import Guard
from nanolib.rundir import Run, StageDir
from nanolib.runtime import Runtime
from nanolib.train import Stopped


@dataclass(kw_only=True)
class Context:
    """What every stage is given."""

    run: Run
    stage: StageDir
    runtime: Runtime
    guard: Guard
    of: str | None = None  # whose model an evaluation is of

    _reported: float = 0.0  # when the last progress row was written

    def progress(self, done: int, total: int, message: str) -> None:
        """A progress row at most twice a second; raises Stopped when the guard asks for it."""
        if self.guard.stop_requested:
            raise Stopped(f"stopped at {message} ({done} of {total})")
        if self.runtime.is_lead and time.monotonic() - self._reported > 0.5:
            self._reported = time.monotonic()
            self.stage.metrics.append(kind="progress", step=done, steps=total, message=message)
