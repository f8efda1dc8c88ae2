"""Processes that work together: hymba-tune works in one, whatever starts it."""

from __future__ import annotations

import os

from hymba_tune.errors import ConfigError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which torchrun, Accelerate, DeepSpeed and MPI say how many processes they started."""


def check_single_process() -> None:
    """Refuse to work in one of several processes: each of them would do, and write, the whole of the work.

    Imports no torch.

    Raises:
        ConfigError: If a launcher has started more than one.
    """
    for name in SIZES:
        size = os.environ.get(name, "")
        if size.isdecimal() and int(size) > 1:
            raise ConfigError(
                f"hymba-tune runs in a single process, and a launcher such as torchrun has started {size} ({name}).",
                fix="start it without the launcher; --device cuda:1 chooses another GPU than the first",
            )
