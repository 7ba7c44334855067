"""The stages: data → tokenizer → shards → base → mid → sft → grpo → eval → report.

Each assembles its parts, runs and writes a done record. A killed stage resumes from what it saved.
"""

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanolib.engine import Engine
from nanolib.guard import Guard
from nanolib.model import GPT
from nanolib.rundir import Run, StageDir
from nanolib.runtime import Runtime
from nanolib.tokenizer import Tokenizer
from nanolib.tools import Sandbox
from nanolib.train import Stopped

Result = dict[str, Any]  # a stage's result, stored in its done record


@dataclass(kw_only=True)
class Context:
    run: Run
    stage: StageDir
    runtime: Runtime
    guard: Guard

    _reported: float = 0.0  # time of the last progress row

    def progress(self, done: int, total: int, message: str) -> None:
        """Log progress, at most twice a second; raises Stopped if the guard requests a stop."""
        if self.guard.stop_requested:
            raise Stopped(f"stopped at {message} ({done} of {total})")
        if self.runtime.is_lead and time.monotonic() - self._reported > 0.5:
            self._reported = time.monotonic()
            self.stage.metrics.append(kind="progress", step=done, steps=total, message=message)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.run.stage("tokenizer").path / "tokenizer.json")

    def engine(self, model: GPT, sandbox: Sandbox) -> Engine:
        return Engine(model, self.tokenizer, self.runtime, lambda code: sandbox.run(code).text)
