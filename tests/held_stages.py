"""The real worker, which ends or stops itself at a given row of its metrics: no kill comes too late.

$HELD is "STAGE ROWS HOW": the stage's directory in the run, the rows of metrics after which it
happens (0: before anything is done), and what happens: SIGKILL; SIGSTOP, which waits for whoever
watches to strike and send SIGCONT; or "stop", as when the launcher is gone and the guard sees it.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from nanolib import rundir
from nanolib.guard import Guard
from nanolib.stages import worker


def main() -> int:
    name, rows, how = os.environ.get("HELD", "none 0 none").split()
    stage, folder, *options = sys.argv[1:]
    of = options[options.index("--of") + 1 :][:1] if "--of" in options else []
    ours = name == "/".join([stage, *of])
    if ours and int(rows) == 0:
        hold(how)
    elif ours:
        append, metrics = rundir.Metrics.append, Path(folder, name, "metrics.jsonl")

        def append_and_hold(self: rundir.Metrics, **row: object) -> None:
            append(self, **row)
            if self.path == metrics and len(self.rows()) == int(rows):
                hold(how)

        rundir.Metrics.append = append_and_hold
    return worker.main()


def hold(how: str) -> None:
    if how != "stop":
        os.kill(os.getpid(), getattr(signal, how))
        return
    seen, request_stop = threading.Event(), Guard.request_stop
    Guard.request_stop = lambda guard: (request_stop(guard), seen.set())
    os.close(LAUNCHERS_END)
    seen.wait()


LAUNCHERS_END = -1  # of the guard's pipe, in a process that `start_here` began


def start_here(words: list[str], held: str) -> None:
    """Be the worker in this process, which a test has forked: much quicker than a new Python."""
    global LAUNCHERS_END
    end, LAUNCHERS_END = os.pipe()
    os.dup2(end, 0)
    os.environ |= {"HELD": held, "NANOLIB_GUARD": "1"}
    sys.argv = ["worker", *words]
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
