"""Progress of a running stage as one line of text."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from nanolib import config
from nanolib.rundir import Run, StageDir

Rows = Sequence[Mapping[str, Any]]  # of a stage's metrics


def clock(seconds: float) -> str:
    """Format seconds: 3725 as 1:02:05, 65 as 1:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def title(stage: StageDir) -> str:
    return f"{stage.name} of {stage.of}" if stage.of else stage.name


def describe(stage: StageDir, rows: Rows, run: Run | None = None) -> str:
    """Such as "base  120/300  loss 2.314  11,532 tokens/s  1:20 left  bpb 0.412".

    With `run`, also the time left for its later stages.
    """
    last = next((row for row in reversed(rows) if row["kind"] in ("train", "progress")), {})
    evaluated = next((row for row in reversed(rows) if row["kind"] == "eval"), {})
    silent = rows[-1]["seconds"] if rows and rows[-1]["kind"] == "silent" else 0
    record, speed = stage.done(), last.get("tokens_per_second")
    counts = "steps" in last and (not record or "loss" in last)
    words = [
        counts and f"{last['step']:,}/{last['steps']:,}",
        "loss" in last and f"loss {last['loss']:.3f}",
        speed and f"{speed:,.0f} tokens/s",
        "seconds_left" in last and not record and f"{clock(last['seconds_left'])} left",
        "bpb" in evaluated and f"bpb {evaluated['bpb']:.3f}",
        not record and last.get("message"),
        silent and not record and f"silent for {clock(silent)}",
        record and f"done in {clock(record.get('seconds', 0))}",
        run and "seconds_left" in last and not record and _run_left(run, stage, last),
    ]
    return "  ".join([f"{title(stage):<9}", *(word for word in words if isinstance(word, str))])


def _run_left(run: Run, stage: StageDir, last: Mapping[str, Any]) -> str:
    """Time left for this and later stages at the run's own pace, and which have none to go by."""
    recipe, counted = run.config.recipe, run.stage("data").result().get("counted", {})
    left, paces, unknown = last["seconds_left"], {}, {}
    for it in run.stages()[:-1]:  # without the report
        size = getattr(getattr(recipe, it.name, None), "batch_tokens", None)
        kind = "tokens" if size else it.name  # stages of one kind have one pace
        amount = size * (config.steps(recipe, it.name, counted) or 0) if size else 1
        if (record := it.done()) and amount:
            paces[kind] = record["seconds"] / amount
        elif it == stage and size:
            paces[kind] = left / (max(1, last["steps"] - last["step"]) * size)
        elif amount and kind in paces:
            left += paces[kind] * amount
        elif not record and it != stage:
            unknown[it.name] = True
    return f"run {clock(left)} left" + (f" without {', '.join(unknown)}" if unknown else "")


class Line:
    """Prints progress: one updating line on a terminal, else a new line every few seconds."""

    def __init__(self, stream: TextIO | None = None, every: float = 5.0, run: Run | None = None):
        self.stream, self.run = stream or sys.stdout, run
        self.every = every
        self._terminal = self.stream.isatty()
        self._printed_at = 0.0
        self._stage: StageDir | None = None  # stage of the last line
        self._text = ""

    def __call__(self, stage: StageDir, rows: Rows) -> None:
        if rows or stage.done():
            if is_other := stage != self._stage:
                self.close()
            self._stage = stage
            self.show(describe(stage, rows, self.run), bool(is_other or stage.done()))

    def show(self, text: str, now: bool = False) -> None:
        """now: print even if a line was printed just before."""
        if self._terminal:
            self.stream.write(f"\r{text[: shutil.get_terminal_size().columns - 1]}\033[K")
        elif text != self._text and (now or time.monotonic() - self._printed_at >= self.every):
            self.stream.write(text + "\n")
            self._printed_at = time.monotonic()
        else:
            return
        self._text = text
        self.stream.flush()

    def say(self, text: str) -> None:
        self.close()
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """End the updating line."""
        if self._terminal and self._text:
            self.stream.write("\n")
        self._stage, self._text = None, ""
