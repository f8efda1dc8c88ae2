"""The devices of this machine, counted without importing torch."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
"""NVIDIA's management library, which every driver brings."""


def count_gpus() -> int:
    """Return the number of GPUs that CUDA may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
    if listed is not None and any(name.startswith("MIG") for name in listed):
        return len(listed)
    present = _count_present()
    if listed is None:
        return present
    # CUDA stops at the first name that it does not know; -1 is the usual way to hide all.
    known = (name.startswith("GPU") or (name.isdecimal() and int(name) < present) for name in listed)
    return next((number for number, is_known in enumerate(known) if not is_known), len(listed)) if present else 0


def _count_present() -> int:
    count = ctypes.c_uint(0)
    with suppress(OSError, AttributeError):  # no driver, or one without this function
        library = ctypes.CDLL(NVML)
        if library.nvmlInit_v2() == 0:
            library.nvmlDeviceGetCount_v2(ctypes.byref(count))
            library.nvmlShutdown()
    return count.value


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
