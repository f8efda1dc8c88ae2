"""Locks of the operating system on files: a process that dies lets go of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hymba_tune.errors import ConfigError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
"""Name of the file that is locked inside a folder while a process works in it."""
TAKEN = (BlockingIOError, PermissionError)
"""What the systems raise where another process holds a lock."""


@contextmanager
def locked(path: Path, what: str = "", *, wait: bool = False) -> Iterator[None]:
    """Hold a lock. Its file is created, and removed at the end; a file that a dead process left is taken over.

    Args:
        path: The file.
        what: What is locked, for the message.
        wait: Wait until another process lets go, instead of giving up.

    Raises:
        ConfigError: If another process or thread holds it, or the file cannot be created.
    """
    try:
        file = _open_locked(path, what or str(path), wait=wait)
    except OSError as error:
        raise ConfigError(f"{what or path} cannot be written: {error.strerror}.", fix="use another one") from error
    try:
        yield
    finally:
        with suppress(OSError):  # its folder is gone, or Windows, where open files cannot be removed
            path.unlink()
        file.close()


def _open_locked(path: Path, what: str, *, wait: bool) -> IO[bytes]:
    while True:
        file = path.open("ab")
        try:
            _lock(file, wait=wait)
        except TAKEN as error:
            file.close()
            raise ConfigError(
                f"{what} is in use by another process of hymba-tune.", fix="wait until that ends, or use another one"
            ) from error
        except OSError:
            return file  # this file system has no locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever held the lock removed the file before this process got it


if sys.platform == "win32":

    def _lock(file: IO[bytes], *, wait: bool) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
else:

    def _lock(file: IO[bytes], *, wait: bool) -> None:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
