"""Commands in processes of their own that die at a chosen change of a file or folder."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hymba_tune.distill.capture
import hymba_tune.evaluate
import hymba_tune.generate
import hymba_tune.hub
import hymba_tune.report  # noqa: F401 (processes fork from a server that has imported everything)
from hymba_tune.cli.main import main
from tests.conftest import ROOT
from tests.train.processes import FORKS, TIMEOUT_SECONDS

CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
"""Audit events that Python raises before it changes files. It raises ``open`` for those that are read as well."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def run_killed(words: list[str], folder: Path, *, at: int | None) -> int:
    """Run a command in a folder, in a process that is killed.

    Args:
        words: The words of the command.
        folder: The current folder of the process; only changes inside it count.
        at: The number of the change that the process dies just before; None to let it end.

    Returns:
        The number of changes that were begun.
    """
    with contextlib.chdir(ROOT):  # from which the server imports what it is to have imported
        forkserver.ensure_running()
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_run, args=(words, folder, at, sender))
    process.start()
    sender.close()
    process.join(TIMEOUT_SECONDS)
    assert process.exitcode == (0 if at is None else -signal.SIGKILL), (words, at, process.exitcode)
    return int(receiver.recv()) if at is None else at


def _run(words: list[str], folder: Path, at: int | None, pipe: Connection) -> None:
    os.chdir(folder)
    changes = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if not (event in CHANGES or (event == "open" and arguments[2] and arguments[2] & WRITING)):
            return
        path = arguments[0]
        if isinstance(path, int) or folder not in (Path.cwd() / os.fsdecode(path)).parents:
            return
        changes += 1
        if changes == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with (
        Path(os.devnull).open("w") as nowhere,
        patch("hymba_tune.distill.cache.SHARD", 8),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        contextlib.suppress(SystemExit),
    ):
        main(words)
    pipe.send(changes)
