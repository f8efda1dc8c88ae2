"""The memory that there is, and what this process holds of it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

GPU_RESERVE = 600 * 2**20
"""Bytes of a GPU that CUDA's context, libraries and the allocator's rounding take beside tensors (not measured here)."""


def device_memory(device: torch.device) -> int:
    """Bytes of a CUDA device, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def held_beside(device: torch.device) -> int:
    """Bytes taken beside a training step's tensors: on a CPU those of this process, which holds Python and libraries.

    On CUDA a reserve.
    """
    if device.type == "cuda":
        return GPU_RESERVE
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
