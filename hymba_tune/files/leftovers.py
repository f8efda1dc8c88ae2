"""What killed processes leave of files and folders that they were writing."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hymba_tune.files.kinds import remove

if sys.platform != "win32":
    import fcntl

TOKEN = "[0-9a-f]{8}"
"""The pattern of what makes a name aside unique."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Mark a file or folder as being written by this process, under whatever name, until the block ends.

    The mark is a lock of the operating system, which a killed process lets go of.

    Args:
        path: The file or folder, which exists.
    """
    if sys.platform == "win32":  # it cannot lock folders, nor rename what is open
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def left_behind(path: Path, ending: str = ".partial") -> list[Path]:
    """Return what killed processes have left of a file or folder under names aside.

    Args:
        path: The file or folder.
        ending: The ending of these names.
    """
    target = Path(os.path.realpath(path))
    name = re.compile(re.escape(target.name) + rf"\.{TOKEN}{re.escape(ending)}")
    with suppress(OSError):
        return [other for other in target.parent.iterdir() if name.fullmatch(other.name) and _is_abandoned(other)]
    return []


def remove_leftovers(*paths: Path) -> None:
    """Remove what killed processes have left of files and folders.

    Args:
        paths: Files and folders that one command writes. If some have their names already, and the others are still
            aside, the command was killed while it gave them their names: these are removed as well.
    """
    left = {path: left_behind(path) for path in paths}
    there = [path for path in paths if os.path.lexists(path)]
    rest = [path for path in paths if path not in there]
    # A file that has its name may have its name aside as well for a moment.
    others = [part for path in there for part in left[path] if not (path.exists() and part.samefile(path))]
    if there and any(left[path] for path in rest) and not others:
        for path in there:
            remove(path)
    for parts in left.values():
        for part in parts:
            remove(part)


def _is_abandoned(path: Path) -> bool:
    """Whether no process holds a file or folder; never true where that cannot be known."""
    if sys.platform == "win32":
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
