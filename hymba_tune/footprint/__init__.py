"""What training takes of memory, known before any weights are loaded."""

from hymba_tune.footprint.machine import GPU_RESERVE, device_memory, process_overhead
from hymba_tune.footprint.shares import Sharding
from hymba_tune.footprint.step import MOMENT_BYTES, Batch, Footprint, StepMemory

__all__ = [
    "GPU_RESERVE",
    "MOMENT_BYTES",
    "Batch",
    "Footprint",
    "Sharding",
    "StepMemory",
    "device_memory",
    "process_overhead",
]
