"""The worker's side of the guard: stop when the launcher is gone.

Standard input is a pipe that the launcher holds open and never writes to: however it ends, every
rank reads end-of-file. (torchrun puts the ranks out of reach of a signal to the process group.)
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass

GRACE = 60.0  # seconds to finish the current step and save


@dataclass
class Guard:
    """Tells the worker to save and end; `grace` seconds later the process kills itself."""

    grace: float = GRACE
    stop_requested: bool = False

    @classmethod
    def start(cls, grace: float = GRACE) -> Guard:
        """Watch standard input if a launcher started this process (NANOLIB_GUARD=1)."""
        guard = cls(grace)
        if os.environ.get("NANOLIB_GUARD") == "1":
            threading.Thread(target=guard._watch, name="guard", daemon=True).start()
        return guard

    def request_stop(self) -> None:
        self.stop_requested = True

    def _watch(self) -> None:
        while os.read(0, 1024):
            pass
        self.request_stop()
        time.sleep(self.grace)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.0)
        os.kill(os.getpid(), signal.SIGKILL)
