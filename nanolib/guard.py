"""Stops a worker when its launcher exits.

Standard input is a pipe that the launcher holds open and never writes to: when the launcher ends,
for any reason, every rank reads end-of-file. (With torchrun, signals to the group miss the ranks.)
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
    """Asks the worker to save and exit; kills the process if it has not after `GRACE` seconds."""

    stop_requested: bool = False

    @classmethod
    def start(cls) -> Guard:
        """Start watching standard input if a launcher started us (NANOLIB_GUARD=1)."""
        guard = cls()
        if os.environ.get("NANOLIB_GUARD") == "1":
            threading.Thread(target=guard._watch, name="guard", daemon=True).start()
        return guard

    def request_stop(self) -> None:
        self.stop_requested = True

    def _watch(self) -> None:
        while os.read(0, 1024):
            pass
        self.request_stop()
        time.sleep(GRACE)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.0)
        os.kill(os.getpid(), signal.SIGKILL)
