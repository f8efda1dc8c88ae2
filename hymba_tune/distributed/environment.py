"""Which process of a run this is. This module does not import torch."""

from __future__ import annotations

import os

from hymba_tune.errors import ConfigError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which torchrun, Accelerate, DeepSpeed and MPI say how many processes they started."""


def world_size() -> int:
    """Return the number of processes of the run."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Return the number of this process, from 0, among all of the run."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Return the number of this process, from 0, among those of its machine."""
    return _number("LOCAL_RANK", 0)


def node() -> int:
    """Return the number of this machine, from 0."""
    return _number("GROUP_RANK", rank() // max(1, _number("LOCAL_WORLD_SIZE", world_size())))


def is_main() -> bool:
    """Return whether this process is the one that writes files and shows progress."""
    return rank() == 0


def check_single_process(verb: str) -> None:
    """Refuse to work in one of several processes: each of them would do, and write, the whole of the work.

    Args:
        verb: The command that works in one process only.

    Raises:
        ConfigError: If a launcher has started more than one.
    """
    for name in SIZES:
        size = os.environ.get(name, "")
        if size.isdecimal() and int(size) > 1:
            raise ConfigError(
                f"hymba-tune {verb} runs in a single process, and a launcher such as torchrun has started {size} "
                f"({name}).",
                fix="start it without the launcher; --device cuda:1 chooses another GPU than the first",
            )


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
