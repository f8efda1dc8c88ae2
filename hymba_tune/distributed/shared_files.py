"""Files that several processes make together, on one machine or on several with a shared folder.

The processes know of each other by the locks that they hold, so that they need not have been started together, and
what a dead one was making is free again. This module does not import torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hymba_tune.distributed.environment import rank, world_size
from hymba_tune.files import InUseError, locked

POLL = 0.1
"""Seconds between two looks at files that other processes are making."""


def make_together(
    paths: Sequence[Path], is_complete: Callable[[int], bool], make: Callable[[int], None], waiting: Callable[[], None]
) -> None:
    """Make the files that are missing; all of them are complete in the end, whoever has made them.

    A process makes its share first, then whatever else is missing and no other process is making: what a slower one
    has not begun, and what a dead one has left. Where a file system has no locks two processes may make the same file,
    so its content must not depend on who makes it, and it must take its name as a whole.

    Args:
        paths: The files.
        is_complete: Whether the file of this number is complete.
        make: Makes the file of this number.
        waiting: Called while there is nothing to do but to wait for other processes.
    """
    numbers = range(len(paths))
    missing = sorted(numbers, key=lambda number: number % world_size() != rank())
    while missing:
        left = []
        for number in missing:
            if is_complete(number):
                # A process that was killed after its last file leaves a lock, which nothing needs any more.
                _claim(paths[number]).unlink(missing_ok=True)
                continue
            try:
                with locked(_claim(paths[number])):
                    if not is_complete(number):
                        make(number)
            except InUseError:
                left.append(number)
            except FileNotFoundError:
                if not is_complete(number):
                    raise
                # A machine that does not see this one's locks has made the same file, and removed what lay aside.
        if left == missing:
            waiting()
            time.sleep(POLL)
        missing = left


def make_once(path: Path, make: Callable[[], None]) -> None:
    """Make a file unless it is there; of several processes the first one makes it, and the others wait for it."""
    with locked(_claim(path), wait=True):
        if not path.is_file():
            make()


def _claim(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
