"""Locks of the operating system on files: a process that dies lets go of them."""

from __future__ import annotations

import errno
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


class InUseError(ConfigError):
    """Another process holds a lock."""


@contextmanager
def locked(path: Path, what: str = "", *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Hold a lock. Its file is created, and removed at the end; a file that a dead process left is taken over.

    Args:
        path: The file.
        what: What is locked, for the message.
        wait: Wait until another process lets go, instead of giving up.
        shared: Hold it together with all others that share it. Windows has no such locks: nothing is held there.

    Raises:
        InUseError: If another process or thread holds it.
        ConfigError: If the file cannot be created.
    """
    try:
        file = _open_locked(path, what or str(path), wait=wait, shared=shared)
    except OSError as error:
        raise ConfigError(f"{what or path} cannot be written: {error.strerror}.", fix="use another one") from error
    try:
        yield
    finally:
        with suppress(OSError):  # others share it, its folder is gone, or Windows: it cannot remove open files
            if shared:
                _lock(file, wait=False, shared=False)
            path.unlink()
        file.close()


def _open_locked(path: Path, what: str, *, wait: bool, shared: bool) -> IO[bytes]:
    while True:
        file = path.open("ab")
        try:
            _lock(file, wait=wait, shared=shared)
        except TAKEN as error:
            file.close()
            raise InUseError(
                f"{what} is in use by another process of hymba-tune.", fix="wait until that ends, or use another one"
            ) from error
        except OSError:
            return file  # this file system has no locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever held the lock removed the file before this process got it


if sys.platform == "win32":

    def _lock(file: IO[bytes], *, wait: bool, shared: bool) -> None:
        if shared:
            return
        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if wait and error.errno == errno.EDEADLK:  # it gives up after ten seconds
                    continue
                raise
            return
else:

    def _lock(file: IO[bytes], *, wait: bool, shared: bool) -> None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
