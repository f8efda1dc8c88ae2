"""A thread in each worker that looks after the others, whatever the worker itself is waiting for."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from hymba_tune.distributed.launch import ENDED_BY_ANOTHER, INTERRUPT, error_file, read_ending

SECONDS = 0.2
"""Time between two looks."""
GRACE_SECONDS = 20.0
"""The time that a worker has to end by itself, after another one has ended by an error of the user."""


class Watch(threading.Thread):
    """Passes Ctrl-C on to the worker, and ends it after the process that started it or another worker has ended."""

    def __init__(self) -> None:
        super().__init__(name="hymba-tune watch", daemon=True)
        self._errors = error_file()
        self._parent = os.getppid()
        self._interrupts = 0
        self._ended_at: float | None = None

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            self.look()
            time.sleep(SECONDS)

    def look(self) -> None:
        """Look once."""
        if self._errors is None:
            return
        if os.getppid() != self._parent:
            sys.stderr.write("hymba-tune: the process that started this one has ended; so does this one.\n")
            os._exit(ENDED_BY_ANOTHER)
        while self._errors.with_name(f"{INTERRUPT}{self._interrupts + 1}").exists():
            self._interrupts += 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if self._ended_at is None and read_ending(self._errors) is not None:
            self._ended_at = time.monotonic()
        if self._ended_at is not None and time.monotonic() > self._ended_at + GRACE_SECONDS:
            os._exit(0)
