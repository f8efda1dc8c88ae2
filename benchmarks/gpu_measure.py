"""Measurement for the GPU benchmark: tables, wall-clock and kernel time, memory, and the GPU's limits."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import ParamSpec, TypeVar

import torch
from gpu_journal import Journal, Table
from gpu_profile import highest_clock, kernels, memory, synchronize
from harness import Cell, Options, Timing, interleave

TIMES = ("ms", "min", "max", "first s", "kernels ms")
"""The columns of a time: of a call, of the first call, and of the kernels of a call."""
TIMES_NOTES = (
    "first s: the first call, with what it compiled and tuned",
    "kernels ms: time in kernels, without the gaps between launches",
)
ROUND = 0.01
"""Minimum duration of a round of calls in seconds; in shorter rounds the clock's resolution matters."""
MEASURED = 1.5
"""Approximate time limit for all rounds of all ways in seconds; there are at least two rounds."""
PROFILED = 2.0
"""Maximum duration of work that is profiled, in seconds; longer work here has hundreds of thousands of launches."""
SPECIAL_PER_CLOCK = 16
"""Exponentials per clock and multiprocessor, on every NVIDIA architecture from Volta to Hopper (CUDA C++ programming
guide, throughput of native arithmetic instructions)."""
FLOAT32_PER_CLOCK = {(7, 0): 64, (7, 5): 64, (8, 0): 64}
"""Float32 multiply-adds per clock and multiprocessor, by compute capability; 128 on newer ones (same source)."""

OUT_OF_TIME = "the time limit (--seconds) is reached"
P = ParamSpec("P")
Result = TypeVar("Result")


class OutOfTimeError(BaseException):
    """The time limit is reached.

    It is no `Exception`, because compilers and backends catch those, and would go on with something else.
    """


class Failure(str):
    """The reason why there is no result."""


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        options: The command-line options.
        deadline: Time on `time.monotonic`'s clock after which nothing new is started.
        journal: Where everything measured is written.
        failures: The failures, as they are printed.
    """

    options: Options
    deadline: float
    journal: Journal = field(default_factory=Journal)
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
    def table(self, name: str, columns: tuple[str, ...], notes: Iterable[str] = ()) -> Iterator[Table]:
        """Yields a table whose rows and notes are written as they come; an error becomes one of its notes."""
        self.journal.write(table=name, columns=list(columns))
        table = Table(name, self.journal)
        table.note(*notes)
        try:
            yield table
        except BaseException as error:
            table.note(f"cut short: {reason(error)}")
            raise

    def fail(self, failure: str) -> None:
        """Record a failure, which makes the exit status 1."""
        self.failures.append(failure)
        self.journal.write(failure=failure)

    def check_time(self) -> None:
        """Check the time limit.

        Raises:
            OutOfTimeError: If it is reached.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTimeError(OUT_OF_TIME)

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
        except Exception as error:
            if not alive(self.device):
                raise  # a kernel that faulted has made the device unusable for this process
            failure = Failure(reason(error))
        # Only here, after the handler, is the memory of the failed work no longer referenced by the error.
        free()
        if not failure.startswith("OutOfMemoryError"):
            self.fail(f"{what}: {failure}")
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
        first, once = {}, {}
        for name, way in ways.items():
            begin = time.perf_counter()
            failure = self.attempt(f"{what}, {name}", way)
            first[name] = time.perf_counter() - begin
            if not isinstance(failure, Failure) and not self.quick:
                failure = self.attempt(f"{what}, {name}", way)
            if isinstance(failure, Failure):
                measured[name] = failure
            else:
                once[name] = first[name] if self.quick else _time(way)
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
            measured[name] = Measured(one, *memory(ways[name], self.device), profiled, first[name])
        return measured


@dataclass(frozen=True)
class Measured:
    """Time and memory of one call.

    Attributes:
        timing: Wall-clock time, including launches and waiting.
        held: Bytes allocated before the call; None on a CPU.
        peak: Peak of allocated bytes, including those before the call; None on a CPU.
        kernels: Seconds and launches of each kernel; see `kernels`.
        first: Seconds of the first call, with what it compiled and tuned.
    """

    timing: Timing
    held: int | None
    peak: int | None
    kernels: dict[str, tuple[float, int]]
    first: float

    @property
    def busy(self) -> float | None:
        """Seconds spent in kernels; None without a profiler."""
        return sum(seconds for seconds, _ in self.kernels.values()) or None

    @property
    def launches(self) -> int | None:
        """The number of kernels and copies; None without a profiler."""
        return sum(launches for _, launches in self.kernels.values()) or None

    def cells(self) -> dict[str, Cell]:
        """The columns `TIMES`, ``launches`` and ``extra MB`` of a row."""
        return self.timing.cells() | {
            "first s": self.first,
            "kernels ms": None if self.busy is None else self.busy * 1e3,
            "launches": self.launches,
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
