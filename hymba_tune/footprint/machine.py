"""The memory of the device, and the part that this process holds."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

LOADED_LATER = {torch.float32: 40 * 2**20, torch.bfloat16: 450 * 2**20}
"""Bytes by dtype that a CPU run holds in addition to tensors once it computes (measured over 40 steps): libraries,
and the kernels that oneDNN compiles for each shape in bfloat16, with fragmentation between them."""
GPU_RESERVE = 600 * 2**20
"""Bytes of a GPU for CUDA's context, libraries and the allocator's rounding, in addition to tensors (not measured)."""


def device_memory(device: torch.device) -> int:
    """Return the bytes of a CUDA device, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_overhead(device: torch.device, dtype: torch.dtype) -> int:
    """Return the bytes in addition to a training step's tensors.

    On a CPU these are the bytes of this process now, such as Python and libraries, and those that it will load later.
    On CUDA they are a reserve.
    """
    if device.type == "cuda":
        return GPU_RESERVE
    return _resident() + LOADED_LATER.get(dtype, 0)


def _resident() -> int:
    """Return the bytes of this process in memory: now, or at its peak where the current ones cannot be read."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
