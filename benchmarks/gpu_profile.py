"""What a GPU does during some work: its kernels, the memory it allocates, and how often the host waits for it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from subprocess import run
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def kernels(work: Callable[[], object], device: torch.device) -> dict[str, tuple[float, int]]:
    """Seconds and launches of each kernel of some work, by name; empty on a CPU or without a profiler."""
    if device.type != "cuda":
        return {}
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            work()
            synchronize()
        # The raw events: PyTorch would take minutes to build the event tree of a long step.
        events = recorded.profiler.kineto_results.events()
    except Exception:  # without a working profiler only its columns are missing
        return {}
    return sum_kernels((event.name(), event.duration_ns()) for event in events if _is_kernel(event))


def _is_kernel(event: Any) -> bool:
    """Whether an event is the device's work, and not the host's or an annotation on the device's timeline."""
    return event.device_type() == DeviceType.CUDA and not event.is_user_annotation()


def sum_kernels(events: Iterable[tuple[str, int]]) -> dict[str, tuple[float, int]]:
    """Sum events, pairs of name and nanoseconds, to seconds and launches by name."""
    spent: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, nanoseconds in events:
        seconds, launches = spent[name]
        spent[name] = seconds + nanoseconds * 1e-9, launches + 1
    return dict(spent)


def memory(work: Callable[[], object], device: torch.device) -> tuple[int | None, int | None]:
    """Bytes allocated before some work, and the peak during it; None on a CPU."""
    if device.type != "cuda":
        return None, None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return before, torch.cuda.max_memory_allocated(device)


def host_waits(work: Callable[[], object], device: torch.device) -> int | None:
    """How often some work waits for the device, as PyTorch's warnings count it; None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@cache
def highest_clock(device: torch.device) -> float | None:
    """The highest clock of the multiprocessors in hertz; None if neither the driver nor PyTorch reports it."""
    if device.type != "cuda":
        return None
    try:
        query = [
            "nvidia-smi",
            f"--id={device.index or 0}",
            "--query-gpu=clocks.max.sm",
            "--format=csv,noheader,nounits",
        ]
        return float(run(query, capture_output=True, text=True, check=True, timeout=20).stdout) * 1e6
    except Exception:
        kilohertz = getattr(torch.cuda.get_device_properties(device), "clock_rate", None)
        return kilohertz and kilohertz * 1e3


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
