"""The memory of the device, and the part that this process holds."""

from __future__ import annotations

import psutil
import torch

from hymba_tune.memory import machine_memory

LOADED_LATER = {torch.float32: 40 * 2**20, torch.bfloat16: 450 * 2**20}
"""Bytes by dtype that a CPU run holds in addition to tensors once it computes (measured over 40 steps): libraries,
and the kernels that oneDNN compiles for each shape in bfloat16, with fragmentation between them."""
GPU_RESERVE = 600 * 2**20
"""Bytes of a GPU for CUDA's context, libraries and the allocator's rounding, in addition to tensors (not measured)."""


def device_memory(device: torch.device) -> int:
    """Return the bytes of a CUDA device, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory()


def process_overhead(device: torch.device, dtype: torch.dtype) -> int:
    """Return the bytes in addition to a training step's tensors.

    On a CPU these are the bytes of this process now, such as Python and libraries, and those that it will load later.
    On CUDA they are a reserve.
    """
    if device.type == "cuda":
        return GPU_RESERVE
    return int(psutil.Process().memory_info().rss) + LOADED_LATER.get(dtype, 0)
