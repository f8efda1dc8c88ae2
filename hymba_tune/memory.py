"""The memory of this process."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import psutil
import torch

if sys.platform != "win32":
    import resource

CONTAINER = Path("/sys/fs/cgroup")
"""The limits of a container's memory, where there is one."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Settings of glibc's allocator, from its malloc.h."""
LARGEST_KEPT = 2**25
"""Bytes of the largest block that is kept: glibc's own upper limit, so that fragmentation stays as small."""
SMALLEST_RETURNED = 2**16
"""Bytes of the smallest block that is returned to the system as soon as it is freed."""


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes so far: of the CUDA device's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_memory() -> int:
    """Return the bytes of this machine's memory."""
    return int(psutil.virtual_memory().total)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still use: of the CUDA device, or of this machine or its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limit, used = CONTAINER / "memory.max", CONTAINER / "memory.current"
    if limit.is_file() and (most := limit.read_text("ascii").strip()) != "max":
        free = min(free, int(most) - int(used.read_text("ascii")))
    return max(free, 0)


def keep_freed_memory() -> bool:
    """Make glibc keep the memory that this process frees, as every training step allocates the same sizes again.

    By default glibc returns memory to the system, which has to clear it page by page at the next allocation; several
    threads then wait for each other. Settings of the user (MALLOC_... or GLIBC_TUNABLES in the environment) take
    precedence.

    Returns:
        Whether the settings were made.
    """
    return _set({M_MMAP_THRESHOLD: LARGEST_KEPT, M_TRIM_THRESHOLD: 2**31 - 1})


def give_back_freed_memory() -> bool:
    """Make glibc return the memory that this process frees to the system at once.

    By default glibc keeps the gaps that freed tensors of tens of megabytes leave between others: more than a whole
    model, once all its tensors have been processed one by one. Settings of the user take precedence, as in
    `keep_freed_memory`.

    Returns:
        Whether the settings were made.
    """
    return _set({M_MMAP_THRESHOLD: SMALLEST_RETURNED})


def _set(settings: dict[int, int]) -> bool:
    set_by_user = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if set_by_user or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    accepted = [libc.mallopt(name, value) for name, value in settings.items()]
    return all(accepted)
