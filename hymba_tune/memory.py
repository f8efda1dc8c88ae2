"""The memory of this process."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Settings of glibc's allocator, from its malloc.h."""
LARGEST_KEPT = 2**25
"""Bytes of the largest block that is kept: as far as glibc goes of itself, so that fragments stay as small."""
SMALLEST_GIVEN_BACK = 2**16
"""Bytes from which on a block is given back as soon as it is freed."""


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the CUDA device's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, where glibc manages it: every step takes the same sizes again.

    Left to itself, glibc hands memory back to the system, which has to clear it page by page when it is next asked
    for; with several threads they wait for each other there. Settings of the user's own (MALLOC_... in the
    environment) are left alone.

    Returns:
        Whether the settings were made.
    """
    return _tell({M_MMAP_THRESHOLD: LARGEST_KEPT, M_TRIM_THRESHOLD: 2**31 - 1})


def give_back_freed_memory() -> bool:
    """Let this process give back what it frees at once, where glibc manages its memory.

    Left to itself, glibc keeps what freed tensors of tens of megabytes leave between others: more than a whole model,
    after tensor upon tensor of it has been worked on. Settings of the user's own are left alone, as above.

    Returns:
        Whether the settings were made.
    """
    return _tell({M_MMAP_THRESHOLD: SMALLEST_GIVEN_BACK})


def _tell(settings: dict[int, int]) -> bool:
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    made = [libc.mallopt(name, value) for name, value in settings.items()]
    return all(made)
