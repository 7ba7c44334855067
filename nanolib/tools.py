"""The sandboxed Python tool: the only place where code written by a model runs.

`Sandbox` keeps worker processes of pydantic-monty, a Python interpreter in Rust without files,
network or environment, and limits time, memory, recursion and output. Workers return only printed
text: the limits do not cover converting values on the host. Monty lacks generators, inheritance
and most modules; `ToolResult.passed` is None for programs that may need them.
"""

import builtins
import math
import os
import re
import secrets
import shlex
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pydantic_monty as monty
from pydantic_monty._binary import find_monty_binary

SOURCE_BYTES = 16 * 1024
OUTPUT_BYTES = 4 * 1024
MEMORY_BYTES = 32 * 1024 * 1024
ERROR_CHARACTERS = 200
# A worker is replaced after this many calls, or one slow one, so it uses only a few CPU seconds in
# total. RLIMIT_CPU can therefore end a busy worker even if its host was killed.
CALLS_PER_WORKER = 50
SLOW_SECONDS = 0.05
STARTS = 5  # the first worker may wait for a cold disk
_LIMITS: monty.ResourceLimits = {
    "max_memory": MEMORY_BYTES,
    "max_recursion_depth": 200,
    "max_suspensions": 100,
    "max_total_sleep_secs": 0,
}

# Runs before the source, which sees only `names`. Monty's `round` multiplies and divides, which is
# wrong for 5 % of halves; CPython rounds the exact decimal expansion, as `:.2f` does.
_PRELUDE = """
builtin_round = round
def exact_round(number, ndigits=None):
    if isinstance(number, float) and ndigits is not None and 0 < ndigits < 23:
        return float(f"{number:.{ndigits}f}")
    return builtin_round(number, ndigits)
names = {"round": exact_round}
value = None
"""
# Both end in None, because a snippet's last value would be sent to the host.
_RUN = f"""{_PRELUDE}
try:
    value = eval(source, names)
except SyntaxError:
    exec(source, names)
if value is not None:
    print(repr(value))
None"""
_CHECK = f"""{_PRELUDE}
exec(source, names)
if mark not in names:
    raise RuntimeError("the program ended before its last line")
None"""
# Errors that Monty raises for missing features. A program gains nothing by forging one.
_LACKING = re.compile(
    r"ModuleNotFoundError: |ImportError: cannot import name |AttributeError: module "
    r"|NotImplementedError: .*not (?:yet )?support"
    r"|NameError: name '(?P<name>\w+)' is not defined"
    r"|AttributeError: (?:type object )?'(?P<type>\w+)' (?:object )?has no attribute '(?P<method>\w+)'"
)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """A program's output (or its value's repr), and its error, if any, as one short line."""

    output: str
    error: str | None = None

    @property
    def text(self) -> str:
        """The text given to the model."""
        return "\n".join(part for part in (self.output, self.error) if part)

    @property
    def passed(self) -> bool | None:
        """True without an error; None if it may be due to a feature that only CPython has."""
        if (found := _LACKING.match(self.error or "")) is None:
            return self.error is None
        owner = getattr(builtins, found["type"], object) if found["type"] else builtins
        name = found["name"] or found["method"]
        return None if name is None or hasattr(owner, name) else False


class Sandbox:
    """A thread-safe pool of sandbox workers: ``with Sandbox() as sandbox: …``.

    `seconds` limits each call, `workers` the number of concurrent calls (default: one per CPU).
    A call that runs out of time is tried once more, in case the machine stood still meanwhile.
    """

    def __init__(self, *, seconds: float = 2.0, workers: int | None = None) -> None:
        self.seconds, self.workers, self._stack = seconds, workers, ExitStack()
        self._pool: monty.Monty | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nanolib-sandbox-"))
            pool = monty.Monty(
                binary_path=_write_launcher(Path(folder), self.seconds),
                max_processes=self.workers or os.cpu_count(),
                request_timeout=self.seconds + 0.5,
                feed_duration_limit_grace=0.25,
                max_checkouts_per_worker=CALLS_PER_WORKER,
            )
            self._pool = stack.enter_context(pool)
            self._stack = stack.pop_all()
        for _ in range(STARTS):  # or every program would seem wrong if no worker can start
            if (probe := self.run("6*7")).output == "42":
                return self
        self.close()
        raise RuntimeError(f"no sandbox worker starts here (`{find_monty_binary()}`): {probe}")

    def close(self, *_: object) -> None:
        """Stop the workers; may be called twice."""
        self._pool = None
        self._stack.close()

    __exit__ = close

    def run(self, source: str) -> ToolResult:
        """Run a model's code and return its printed output, or for an expression its repr.

        Plain arithmetic may contain commas. Errors of the program are returned, not raised.
        """
        return self._feed(_RUN, source=without_commas(source.strip()))

    def check(self, program: str) -> ToolResult:
        """Run a program that ends with its tests; fails if it stops before its last line."""
        mark = f"reached_{secrets.token_hex(8)}"  # set by the last line; cannot be guessed
        return self._feed(_CHECK, source=f"{program}\n{mark} = True\n", mark=mark)

    def _feed(self, code: str, **inputs: str) -> ToolResult:
        pool = self._pool  # another thread may set it to None
        if pool is None:
            raise RuntimeError("the sandbox is closed: use it inside `with Sandbox() as sandbox:`")
        if len(inputs["source"].encode(errors="replace")) > SOURCE_BYTES:
            return ToolResult("", f"ValueError: the program is longer than {SOURCE_BYTES} bytes")
        result = self._attempt(pool, code, inputs)
        timed_out = (result.error or "").startswith("TimeoutError: the program")
        return self._attempt(pool, code, inputs) if timed_out else result

    def _attempt(self, pool: monty.Monty, code: str, inputs: dict[str, str]) -> ToolResult:
        output, error = monty.CollectString(max_bytes=OUTPUT_BYTES), None
        session = pool.checkout(
            limits={"max_feed_duration_secs": self.seconds, **_LIMITS},
            os_policy={"sleep": "zero"},
            assert_message_annotations=False,
        )
        try:
            with session:
                started = time.monotonic()
                try:
                    session.feed_run(code, inputs=inputs, print_callback=output)
                finally:
                    slow = time.monotonic() - started > SLOW_SECONDS
                    if slow and session.worker_pid is not None:  # else it crashed
                        with suppress(ProcessLookupError):
                            os.kill(session.worker_pid, signal.SIGKILL)  # the pool starts another
        except monty.MontyCrashedError as crash:
            how = "feed time limit exceeded" if crash.timed_out else "the sandbox crashed"
            error = f"RuntimeError: {how}"
        except (monty.MontyRuntimeError, monty.MontySyntaxError) as wrong:
            error = wrong.display("type-msg")
        except (monty.MontyError, TypeError, ValueError, RecursionError) as wrong:
            error = f"{type(wrong).__name__}: {wrong}"
        return ToolResult(output.output.rstrip("\n"), error and self._plain(error))

    def _plain(self, error: str) -> str:
        """Shorten an error to one line of `ERROR_CHARACTERS`, without run-dependent numbers."""
        if "feed time limit exceeded" in error:
            return f"TimeoutError: the program took longer than {self.seconds:g} s"
        if "memory limit exceeded" in error or "exceeded its memory limit" in error:
            much = f"needed more than {MEMORY_BYTES >> 20} MiB"
            if f"> {OUTPUT_BYTES} bytes" in error:
                much = f"printed more than {OUTPUT_BYTES} bytes"
            return f"MemoryError: the program {much}"
        line = " ".join(error.split())
        return line if len(line) <= ERROR_CHARACTERS else line[: ERROR_CHARACTERS - 1] + "…"


def without_commas(source: str) -> str:
    """Remove commas between digits in plain arithmetic: ``1,000*3`` becomes ``1000*3``.

    As in nanochat's calculator, this includes ``(1,2)``; other source (``max(12,300)``) stays.
    """
    plain = re.fullmatch(r"[0-9\s.,()+\-*/%]*", source)
    return re.sub(r"(?<=[0-9]),(?=[0-9])", "", source) if plain else source


def _write_launcher(folder: Path, seconds: float) -> Path:
    """Write a script that closes inherited descriptors, sets rlimits and execs the worker."""
    limits = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 16}
    limits["RLIMIT_CPU"] = math.ceil(CALLS_PER_WORKER * SLOW_SECONDS + seconds + 0.5)
    if sys.platform == "linux":  # macOS refuses to limit the address space
        limits["RLIMIT_AS"] = 512 * 1024 * 1024
    binary = str(find_monty_binary())
    program = (
        "import os, resource, sys\n"
        'os.closerange(3, os.sysconf("SC_OPEN_MAX"))\n'
        f"for name, value in {limits}.items():\n"
        "    resource.setrlimit(getattr(resource, name), (value, value))\n"
        f"os.execve({binary!r}, [{binary!r}, *sys.argv[1:]], {{}})\n"
    )
    launcher, run = folder / "launch.sh", shlex.join([sys.executable, "-IS", "-c", program])
    launcher.write_text(f'#!/bin/sh\nexec {run} "$@" 2>/dev/null\n')  # or it would seem to fail
    launcher.chmod(0o700)
    return launcher
