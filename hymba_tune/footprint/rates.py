"""The speed of this machine's device, measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hymba_tune.footprint.cards import LAUNCH
from hymba_tune.footprint.work import Speeds

COPIED = 2**26
"""The bytes of the tensor that is copied, more than a cache holds."""
REACHED = {torch.float32: 0.9, torch.bfloat16: 0.7}
"""The share of the measured speeds that a step reaches on a CPU: attention and the scan compute in float32 whatever the
dtype, and not as fast as products (measured: benchmarks/plan.py)."""
CALL = 5e-6
"""Seconds of an operation on a CPU before it computes."""


def measured_speeds(width: int, device: torch.device, dtype: torch.dtype) -> Speeds:
    """Measure the speeds of a device, which takes half a second.

    Args:
        width: The model's width.
        device: The device.
        dtype: The dtype of the computation.
    """
    x, weight = (torch.randn(shape, dtype=dtype, device=device) for shape in ((512, width), (width, 4 * width)))
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    operations = 2 * x.numel() * weight.shape[1] / _seconds(lambda: float((x @ weight)[0, 0]))
    moved = 2 * COPIED / _seconds(lambda: float(target.copy_(source)[0]))
    if device.type != "cpu":
        return Speeds(operations, moved, LAUNCH)
    share = REACHED.get(dtype, REACHED[torch.float32])
    return Speeds(share * operations, share * moved, CALL / share, overlap=False)


def _seconds(work: Callable[[], float], least: float = 0.25) -> float:
    """Return the seconds of some work, which waits for its result."""
    work()
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < least:
        work()
        done += 1
    return (time.perf_counter() - started) / done
