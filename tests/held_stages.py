"""The real worker, which stops itself (SIGSTOP) where it is to be struck: no kill comes too late.

$HELD names the stage's directory in the run and the rows of metrics after which it stops; "base 9",
or "data 0" for a stop before anything is done. It goes on when it is sent SIGCONT.
"""

import os
import signal
import sys
from pathlib import Path

from nanolib import rundir
from nanolib.stages import worker


def hold() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def main() -> int:
    name, _, rows = os.environ.get("HELD", "").partition(" ")
    stage, folder, *options = sys.argv[1:]
    of = options[options.index("--of") + 1 :][:1] if "--of" in options else []
    ours = name == "/".join([stage, *of])
    if ours and int(rows) == 0:
        hold()
    elif ours:
        append, metrics = rundir.Metrics.append, Path(folder, name, "metrics.jsonl")

        def append_and_hold(self: rundir.Metrics, **row: object) -> None:
            append(self, **row)
            if self.path == metrics and len(self.rows()) == int(rows):
                hold()

        rundir.Metrics.append = append_and_hold
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
