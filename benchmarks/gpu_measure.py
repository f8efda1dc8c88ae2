"""Measurement for the GPU benchmark: tables, wall-clock and kernel time, memory, and the GPU's limits."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import ceil
from subprocess import run
from typing import Any, ParamSpec, TypeVar

import torch
from harness import Cell, Options, Timing, interleave, report
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROUND = 0.01
"""Minimum duration of a round of calls in seconds; in shorter rounds the clock's resolution matters."""
MEASURED = 3.0
"""Approximate time limit for all rounds of all ways in seconds; there are at least two rounds."""
PROFILED = 2.0
"""Maximum duration of work that is profiled, in seconds; longer work here has hundreds of thousands of launches."""
SPECIAL_PER_CLOCK = 16
"""Exponentials per clock and multiprocessor, on every NVIDIA architecture from Volta to Hopper (CUDA C++ programming
guide, throughput of native arithmetic instructions)."""
FLOAT32_PER_CLOCK = {(7, 0): 64, (7, 5): 64, (8, 0): 64}
"""Float32 multiply-adds per clock and multiprocessor, by compute capability; 128 on newer ones (same source)."""

Row = Mapping[str, Cell]
P = ParamSpec("P")
Result = TypeVar("Result")


class OutOfTimeError(Exception):
    """The time limit is reached."""


class Failure(str):
    """The reason why there is no result."""


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        options: The command-line options.
        deadline: Time on `time.monotonic`'s clock after which nothing new is started.
        failures: The failures, as they are printed.
    """

    options: Options
    deadline: float
    failures: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """The device that is measured."""
        return self.options.device

    @property
    def quick(self) -> bool:
        """Whether sizes are toy sizes."""
        return self.options.quick

    @cached_property
    def limits(self) -> Limits:
        """The device's limits, measured at first use."""
        return measure_limits(self)

    @contextmanager
    def table(self, name: str, columns: tuple[str, ...], notes: list[str]) -> Iterator[list[Row]]:
        """Yields a list for rows; they are reported at the end, also after an error."""
        rows: list[Row] = []
        try:
            yield rows
        except BaseException as error:
            notes.append(f"cut short: {reason(error)}")
            raise
        finally:
            report(f"gpu_{name}", columns, rows, notes, self.options)

    def check_time(self) -> None:
        """Check the time limit.

        Raises:
            OutOfTimeError: If it is reached.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTimeError("the time limit (--minutes) is reached")

    def attempt(self, what: str, work: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result | Failure:
        """Run work that may fail, such as kernels and large sizes; returns its result or the failure.

        Raises:
            OutOfTimeError: If the time limit is reached.
        """
        self.check_time()
        try:
            result = work(*args, **kwargs)
            synchronize()
            return result
        except OutOfTimeError:
            raise
        except Exception as error:
            if not alive(self.device):
                raise  # a kernel that faulted has made the device unusable for this process
            failure = Failure(reason(error))
        # Only here, after the handler, is the memory of the failed work no longer referenced by the error.
        free()
        if not failure.startswith("OutOfMemoryError"):
            self.failures.append(f"{what}: {failure}")
        return failure

    def measure(self, what: str, ways: Mapping[str, Callable[[], object]]) -> dict[str, Measured | Failure]:
        """Time several ways in turn.

        Args:
            what: What is measured, for messages.
            ways: The functions to call, by name. Each is called twice first, so that it is compiled and tuned.

        Returns:
            The measurements or the failure of each way.
        """
        measured: dict[str, Measured | Failure] = {}
        once = {}
        for name, way in ways.items():
            failure = self.attempt(f"{what}, {name}", _repeated(way, 1 if self.quick else 2))
            if isinstance(failure, Failure):
                measured[name] = failure
            else:
                once[name] = _time(way)
        calls = {name: 1 if self.quick else ceil(ROUND / once[name]) for name in once}
        if not calls:
            return measured
        repeats = max(2, int(MEASURED / sum(once[name] * calls[name] for name in calls)))
        timings = interleave(
            {name: _repeated(ways[name], calls[name]) for name in calls}, min(repeats, self.options.repeats), warmup=0
        )
        for name, timing in timings.items():
            one = Timing(tuple(seconds / calls[name] for seconds in timing.rounds))
            profiled = kernels(ways[name], self.device) if once[name] < PROFILED else {}
            measured[name] = Measured(one, *memory(ways[name], self.device), profiled)
        return measured


@dataclass(frozen=True)
class Measured:
    """Time and memory of one call.

    Attributes:
        timing: Wall-clock time, including launches and waiting.
        held: Bytes allocated before the call; None on a CPU.
        peak: Peak of allocated bytes, including those before the call; None on a CPU.
        kernels: Seconds and launches of each kernel; see `kernels`.
    """

    timing: Timing
    held: int | None
    peak: int | None
    kernels: dict[str, tuple[float, int]]

    @property
    def busy(self) -> float | None:
        """Seconds spent in kernels; None without a profiler."""
        return sum(seconds for seconds, _ in self.kernels.values()) or None

    def cells(self) -> dict[str, Cell]:
        """The columns ``ms``, ``min``, ``max``, ``kernels ms`` and ``extra MB`` of a row."""
        return self.timing.cells() | {
            "kernels ms": None if self.busy is None else self.busy * 1e3,
            "extra MB": None if self.peak is None or self.held is None else (self.peak - self.held) / 1e6,
        }


@dataclass(frozen=True)
class Limits:
    """The limits of a GPU; None if unknown.

    Attributes:
        bandwidth: Bytes per second, read and written, of a large copy.
        matmul: bf16 FLOP per second of a large product of random matrices.
        special: Exponentials per second, from `SPECIAL_PER_CLOCK`.
        float32: Float32 multiply-adds per second, from `FLOAT32_PER_CLOCK`.
    """

    bandwidth: float
    matmul: float
    special: float | None
    float32: float | None


def measure_limits(bench: Bench) -> Limits:
    """Measure the limits of the device.

    Raises:
        RuntimeError: If the copy or the product fails.
    """
    size, side = (2**20, 64) if bench.quick else (2**31, 8192)
    source = torch.ones(size // 4, device=bench.device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=bench.device).bfloat16()
    product = torch.empty_like(a)
    ways = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)}
    measured = bench.measure("limits", ways)
    copy, matmul = measured["copy"], measured["matmul"]
    if isinstance(copy, Failure) or isinstance(matmul, Failure):
        raise RuntimeError(f"the limits of the device cannot be measured: copy {copy}, matmul {matmul}")
    clocks = _multiprocessor_clocks(bench.device)
    float32_per_clock = 128 if clocks is None else FLOAT32_PER_CLOCK.get(torch.cuda.get_device_capability(), 128)
    return Limits(
        bandwidth=2 * size / copy.timing.median,
        matmul=2 * side**3 / matmul.timing.median,
        special=None if clocks is None else clocks * SPECIAL_PER_CLOCK,
        float32=None if clocks is None else clocks * float32_per_clock,
    )


def _multiprocessor_clocks(device: torch.device) -> float | None:
    """Clocks per second of all multiprocessors together, at the highest clock."""
    clock = highest_clock(device)
    return None if clock is None else clock * torch.cuda.get_device_properties(device).multi_processor_count


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


def alive(device: torch.device) -> bool:
    """Whether this process can still use the device."""
    try:
        return bool(torch.ones(1, device=device).add(1).item() == 2)
    except RuntimeError:
        return False


def free() -> None:
    """Return unreferenced memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """An error in one line, without brackets, which a table would interpret as markup."""
    first_line = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {first_line}".translate(str.maketrans("[]", "()"))


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def _repeated(work: Callable[[], object], calls: int) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(calls):
            work()

    return repeat
