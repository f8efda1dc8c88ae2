"""Threads in each process that look after the others, whatever the process itself is waiting for.

A process shows by its heartbeat that it lives, and listens to that of the next one, so that a ring of them covers all.
Whoever ends by an error says so in the store that all share; the others then end as well, however they wait. On the
machine of the process that has started this one, files do the same before the processes have met.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from hymba_tune.distributed.environment import is_main, rank, world_size
from hymba_tune.distributed.launch import (
    ENDED,
    ENDED_BY_ANOTHER,
    FINAL,
    INTERRUPT,
    Ending,
    RankError,
    error_file,
    read_ending,
    write_ending,
)

SECONDS, BEAT = 0.2, 1.0
"""Time between two looks, and between two heartbeats."""
SHARE = 0.8
"""Share of the step's time-out after which a silent process counts as lost: before operations of all time out."""
GRACE_SECONDS = 60.0
"""The time that a process has to end by itself, after another one has ended by an error of the user."""
VERDICT_SECONDS = 10.0
"""The time to wait, after a broken connection, for those who know why it broke."""
CUT_OFF = re.compile("[Cc]onnection (closed|reset|refused)|remote process exited|[Bb]roken pipe")
TIMED_OUT = re.compile("[Tt]imed out|[Tt]imeout")


class Watch:
    """Looks after the other processes of a run, and ends this one when it waits for them in vain."""

    def __init__(self) -> None:
        self._errors = error_file()
        self._parent = os.getppid()
        self._interrupts = 0
        self._ended_for: float | None = None
        self._looked = time.monotonic()
        self._store: Any = None
        self._publishing: Any = None
        self._limit = float("inf")
        self._left = False
        self._silence = {"store": 0.0, "next": 0.0}
        self._beats = -1
        self._verdict: Ending | None = None

    def start(self) -> None:
        """Begin to look, until the process ends."""
        threading.Thread(target=self._keep_looking, name="hymba-tune watch", daemon=True).start()

    def attend(self, store: Any, step_timeout: float) -> None:
        """Begin to show that this process lives, and to listen to the others.

        Args:
            store: The store that all processes share.
            step_timeout: Seconds that an operation of all processes may take.
        """
        # Connections of their own: another one may be in use for a long time.
        self._store, self._publishing = store.clone(), store.clone()
        self._limit = SHARE * step_timeout
        self._store.set(f"host/{rank()}", socket.gethostname())
        self._store.set(f"pid/{rank()}", str(os.getpid()))
        threading.Thread(target=self._listen, name="hymba-tune heartbeat", daemon=True).start()

    def leave(self) -> None:
        """Tell the others that this process has done its part."""
        if self._store is not None and not self._left:
            self._left = True
            with suppress(RuntimeError):
                self._publishing.set(f"left/{rank()}", b"")

    def publish(self, ending: Ending) -> bool:
        """Say in the store how this process ends.

        Returns:
            Whether it is the first one to say so.
        """
        text = json.dumps(asdict(ending))
        try:
            return bool(self._publishing.compare_set(ENDED, "", text).decode() == text)
        except RuntimeError:
            return is_main()

    @property
    def attends(self) -> bool:
        """Whether the processes have met."""
        return self._publishing is not None

    def _keep_looking(self) -> None:
        while True:
            self.look()
            time.sleep(SECONDS)

    def look(self) -> None:
        """Look once after what concerns this process."""
        now = time.monotonic()
        seconds = min(now - self._looked, 2 * SECONDS)  # a process that was stopped itself has not waited for others
        self._looked = now
        if self._errors is not None:
            self._look_at_files()
        if self._verdict is not None:
            self._follow(self._verdict, seconds)
        if self._store is not None and not self._left:
            self._look_at_silence(seconds)

    def _look_at_files(self) -> None:
        assert self._errors is not None
        if os.getppid() != self._parent:
            sys.stderr.write("hymba-tune: the process that started this one has ended; so does this one.\n")
            os._exit(ENDED_BY_ANOTHER)
        while self._errors.with_name(f"{INTERRUPT}{self._interrupts + 1}").exists():
            self._interrupts += 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        self._verdict = self._verdict or read_ending(self._errors)

    def _follow(self, verdict: Ending, seconds: float) -> None:
        """End after another process has ended; after an error of the user, only if this one does not by itself."""
        if verdict.code not in FINAL:
            self._end(verdict.message)
        self._ended_for = seconds + (self._ended_for or 0.0)
        if self._ended_for > GRACE_SECONDS:
            os._exit(0 if self._errors is not None else verdict.code)

    def _look_at_silence(self, seconds: float) -> None:
        for name in self._silence:
            self._silence[name] += seconds
        if self._silence["store"] > self._limit:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            self._end(
                f"nothing has been heard for {self._limit:.0f} s from {where}, where the processes meet", rank() == 1
            )
        if self._silence["next"] > self._limit and not self._publishing.check([f"left/{self._next}"]):
            host = self._publishing.get(f"host/{self._next}").decode()
            if host == socket.gethostname():
                with suppress(OSError):  # a stopped process does not end before it goes on
                    os.kill(int(self._publishing.get(f"pid/{self._next}")), signal.SIGCONT)
            self._end(f"rank {self._next} on {host} has been silent for {self._limit:.0f} s")

    @property
    def _next(self) -> int:
        return (rank() + 1) % world_size()

    def _listen(self) -> None:
        """Beat, and listen to the next process and to whoever has ended."""
        while not self._left:
            try:
                self._store.add(f"beat/{rank()}", 1)
                if (beats := self._store.add(f"beat/{self._next}", 0)) != self._beats:
                    self._beats = beats
                    self._silence["next"] = 0.0
                self._silence["store"] = 0.0
                if self._store.check([ENDED]):
                    ending = Ending(**json.loads(self._store.get(ENDED)))
                    if ending.rank != rank():
                        self._verdict = ending
            except RuntimeError:  # the store is gone, and with it the machine or the process that served it
                if not self._left:
                    self._silence["store"] = self._limit
                return
            time.sleep(BEAT)

    def _end(self, message: str, tells: bool | None = None) -> None:
        """End this process, which waits for another one in vain.

        Args:
            message: What has happened to the other one.
            tells: Whether this process tells the user; None for the first one to say so in the store.
        """
        if self._errors is not None:
            write_ending(ENDED_BY_ANOTHER, message)
        first = self.publish(Ending(ENDED_BY_ANOTHER, message, rank())) if tells is None else tells
        if first and self._errors is None:
            sys.stderr.write(f"{message}; the other processes end. --resume continues the run.\n")
            sys.stderr.flush()
        os._exit(ENDED_BY_ANOTHER)


_watch: Watch | None = None


def start() -> Watch:
    """Return the watch of this process, which is started at the first call."""
    global _watch
    if _watch is None:
        _watch = Watch()
        _watch.start()
    return _watch


def tell(code: int, message: str) -> bool:
    """Tell the other processes, and the one that has started this one, how this one ends.

    Args:
        code: The exit code of the command.
        message: What to tell the user.

    Returns:
        Whether this process is to show the message itself.
    """
    first = is_main()
    if _watch is not None and _watch.attends:
        first = _watch.publish(Ending(code, message, rank()))
    if error_file() is None:
        return first
    write_ending(code, message)
    return False


def explain(error: Exception) -> RankError | None:
    """Return an error to show for an operation of all processes that failed; None for other errors.

    Where another process has died, those who know it get the time to say so, and this one ends meanwhile.
    """
    if _watch is None or not _watch.attends or not isinstance(error, RuntimeError):
        return None
    if CUT_OFF.search(str(error)):
        time.sleep(VERDICT_SECONDS)
        return RankError(
            f"rank {rank()} has lost its connection to another process: {error}", exit_code=1, fix="--resume the run"
        )
    if TIMED_OUT.search(str(error)):
        return RankError(
            f"a step did not end within --step-timeout: rank {rank()} has waited for another process, which lives but "
            "does something else",
            exit_code=1,
            fix="--resume the run, or a longer --step-timeout if steps take so long",
        )
    return None
