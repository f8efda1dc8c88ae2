"""How the GPU benchmark measures: tables kept whatever happens, time by the clock and in kernels, the card's limits."""

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
"""Seconds that a round of calls takes at least: shorter ones measure the clock."""
MEASURED = 3.0
"""Seconds that all rounds of all ways may take, about; there are two rounds at least."""
PROFILED = 2.0
"""Seconds of work that is still profiled: what takes longer here are loops of hundreds of thousands of launches."""
SPECIAL_PER_CLOCK = 16
"""Exponentials a multiprocessor makes a clock, on every NVIDIA architecture from Volta to Hopper (CUDA C++ programming
guide, throughput of native arithmetic instructions)."""
FLOAT32_PER_CLOCK = {(7, 0): 64, (7, 5): 64, (8, 0): 64}
"""Float32 multiply-adds likewise, by compute capability; 128 on all newer ones (same source)."""

Row = Mapping[str, Cell]
P = ParamSpec("P")
Result = TypeVar("Result")


class OutOfTimeError(Exception):
    """The minutes given are over."""


class Failure(str):
    """Why there is no result."""


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        given: The command line.
        deadline: On `time.monotonic`'s clock; nothing new is begun after it.
        failures: What went wrong, as it was printed.
    """

    given: Options
    deadline: float
    failures: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where everything is measured."""
        return self.given.device

    @property
    def quick(self) -> bool:
        """Whether toy sizes will do."""
        return self.given.quick

    @cached_property
    def limits(self) -> Limits:
        """Of the device, measured when first asked for."""
        return measure_limits(self)

    @contextmanager
    def table(self, name: str, columns: tuple[str, ...], notes: list[str]) -> Iterator[list[Row]]:
        """Rows to be added to; they are reported at the end, also if that is an error."""
        rows: list[Row] = []
        try:
            yield rows
        except BaseException as error:
            notes.append(f"cut short: {reason(error)}")
            raise
        finally:
            report(f"gpu_{name}", columns, rows, notes, self.given)

    def check_time(self) -> None:
        """Raise if the minutes are over.

        Raises:
            OutOfTimeError: If they are.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTimeError("the minutes given (--minutes) are over")

    def attempt(self, what: str, work: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result | Failure:
        """The result of some work that may fail, as kernels and large sizes do, or why it did.

        Raises:
            OutOfTimeError: If the minutes are over.
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
                raise  # a kernel that faults takes the device away from this process
            failure = Failure(reason(error))
        # Only here, behind the handler, has the error let go of what the work held.
        free()
        if not failure.startswith("OutOfMemoryError"):
            self.failures.append(f"{what}: {failure}")
        return failure

    def measure(self, what: str, ways: Mapping[str, Callable[[], object]]) -> dict[str, Measured | Failure]:
        """Time several ways in turn.

        Args:
            what: Is done in these ways, for messages.
            ways: What to call, by name. Each is called twice before it counts, so that it is compiled and tuned.

        Returns:
            For each way its measures, or the reason why it failed.
        """
        found: dict[str, Measured | Failure] = {}
        once = {}
        for name, way in ways.items():
            failure = self.attempt(f"{what}, {name}", _repeated(way, 1 if self.quick else 2))
            if isinstance(failure, Failure):
                found[name] = failure
            else:
                once[name] = _time(way)
        calls = {name: 1 if self.quick else ceil(ROUND / once[name]) for name in once}
        if not calls:
            return found
        repeats = max(2, int(MEASURED / sum(once[name] * calls[name] for name in calls)))
        timings = interleave(
            {name: _repeated(ways[name], calls[name]) for name in calls}, min(repeats, self.given.repeats), warmup=0
        )
        for name, timing in timings.items():
            one = Timing(tuple(taken / calls[name] for taken in timing.rounds))
            profiled = kernels(ways[name], self.device) if once[name] < PROFILED else {}
            found[name] = Measured(one, *memory(ways[name], self.device), profiled)
        return found


@dataclass(frozen=True)
class Measured:
    """What one call of a way costs.

    Attributes:
        timing: By the clock, launches and waiting included.
        held: Bytes allocated before, or None off the GPU.
        peak: Bytes allocated at most, those before included, or None off the GPU.
        kernels: `kernels` of the way.
    """

    timing: Timing
    held: int | None
    peak: int | None
    kernels: dict[str, tuple[float, int]]

    @property
    def busy(self) -> float | None:
        """Seconds that the device computed, or None where no profiler says so."""
        return sum(seconds for seconds, _ in self.kernels.values()) or None

    def cells(self) -> dict[str, Cell]:
        """The columns ``ms``, ``min``, ``max``, ``kernels ms`` and ``extra MB`` of a row."""
        return self.timing.cells() | {
            "kernels ms": None if self.busy is None else self.busy * 1e3,
            "extra MB": None if self.peak is None or self.held is None else (self.peak - self.held) / 1e6,
        }


@dataclass(frozen=True)
class Limits:
    """What a card can do at most; None where it does not say.

    Attributes:
        bandwidth: Bytes a second, read and written, by a large copy.
        matmul: bf16 FLOP a second, by a large product of random matrices.
        special: Exponentials a second, by `SPECIAL_PER_CLOCK`.
        float32: Float32 multiply-adds a second, by `FLOAT32_PER_CLOCK`.
    """

    bandwidth: float
    matmul: float
    special: float | None
    float32: float | None


def measure_limits(bench: Bench) -> Limits:
    """The limits of the device.

    Raises:
        RuntimeError: If it can neither copy nor multiply what a card can.
    """
    size, side = (2**20, 64) if bench.quick else (2**31, 8192)
    source = torch.ones(size // 4, device=bench.device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=bench.device).bfloat16()
    product = torch.empty_like(a)
    ways = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)}
    found = bench.measure("limits", ways)
    copy, matmul = found["copy"], found["matmul"]
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
    """Clocks a second of all multiprocessors together, at the highest clock."""
    clock = highest_clock(device)
    return None if clock is None else clock * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def highest_clock(device: torch.device) -> float | None:
    """The highest clock of the multiprocessors in hertz, or None where neither the driver nor PyTorch says."""
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
    """Seconds and launches of each kernel of some work, by its name; none off the GPU or without a profiler."""
    if device.type != "cuda":
        return {}
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            work()
            synchronize()
        # The events as they were recorded: PyTorch would take minutes to make a tree of a long step's.
        events = recorded.profiler.kineto_results.events()
    except Exception:  # a profiler that cannot work here takes nothing but its column away
        return {}
    return sum_kernels((event.name(), event.duration_ns()) for event in events if _is_kernel(event))


def _is_kernel(event: Any) -> bool:
    """Whether it is the device's work, and not the host's or a mark on the device's timeline."""
    return event.device_type() == DeviceType.CUDA and not event.is_user_annotation()


def sum_kernels(events: Iterable[tuple[str, int]]) -> dict[str, tuple[float, int]]:
    """Seconds and launches by name, of names with nanoseconds."""
    spent: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, nanoseconds in events:
        seconds, launches = spent[name]
        spent[name] = seconds + nanoseconds * 1e-9, launches + 1
    return dict(spent)


def memory(work: Callable[[], object], device: torch.device) -> tuple[int | None, int | None]:
    """Bytes allocated before some work, and at most during it; None off the GPU."""
    if device.type != "cuda":
        return None, None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return before, torch.cuda.max_memory_allocated(device)


def alive(device: torch.device) -> bool:
    """Whether the device still computes for this process."""
    try:
        return bool(torch.ones(1, device=device).add(1).item() == 2)
    except RuntimeError:
        return False


def free() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """An error in a line, without the brackets that a table would take for markup."""
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
