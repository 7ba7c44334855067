"""The worker's side of the guard: stop when whoever started us is gone.

The launcher holds the writing end of a pipe whose reading end is our standard input, and never
writes. However the launcher ends (Ctrl-C, an exception, ``kill -9``), the system closes its end
and we read end-of-file. torchrun puts every rank in a session of its own, out of reach of a
signal to its group, but descriptors are inherited: every rank reads the same pipe.
"""

from __future__ import annotations

import os
import signal
import threading
import time

GRACE = 60.0  # seconds to finish the step and save it


class Guard:
    """A flag that turns true when the work should be saved and ended.

    Loops look at `stop_requested` between steps or items. A process that has not ended
    `grace` seconds after the request ends itself by SIGTERM, then by SIGKILL.
    """

    def __init__(self, grace: float = GRACE) -> None:
        self.grace = grace
        self._stop = threading.Event()

    @classmethod
    def start(cls, grace: float = GRACE) -> Guard:
        """Watch standard input if a launcher started us (NANOLIB_GUARD=1); else never stop."""
        guard = cls(grace)
        if os.environ.get("NANOLIB_GUARD") == "1":
            threading.Thread(target=guard._watch, name="guard", daemon=True).start()
        return guard

    @property
    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Ask for a stop from inside, as the end of the pipe does from outside."""
        self._stop.set()

    def _watch(self) -> None:
        while os.read(0, 1024):
            pass
        self.request_stop()
        time.sleep(self.grace)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.0)
        os.kill(os.getpid(), signal.SIGKILL)
