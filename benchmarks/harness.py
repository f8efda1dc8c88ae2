"""The common parts of all benchmarks: command line, timing, peak memory and report.

Rules: variants are timed in turn, so that a machine that slows down slows all of them; their ratios within one round
are compared; and every report includes the machine and the library versions. On a machine that others use too,
``--cpu-time`` counts the time that one core computes, without the time that it works for others.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hymba_tune.checkpoint import choose_device, choose_dtype

HERE = Path(__file__).parent
LIBRARIES = ("hymba-tune", "torch", "transformers", "triton", "mamba-ssm", "causal-conv1d", "flash-attn")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Instruction sets of CPUs that matter here, in ascending order, by their names in the Linux kernel."""
LOAD_AT_START = os.getloadavg()[0]
SHORT = 0.5
"""Maximum duration of a short call in seconds."""
WIDTH = 120
"""Width of the output in columns if it is not a terminal."""
M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h: blocks of at least this size get their own pages, which are returned when freed."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLOCK: dict[str, Callable[[], float]] = {"now": time.perf_counter}
"""The clock that all timings read."""

Cell = str | int | float | None
P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """The command-line options.

    Attributes:
        quick: Whether to run toy sizes for one round, to check that the benchmark runs.
        repeats: Number of timed rounds.
        device: The device to measure.
        dtypes: The dtypes to measure.
        out: Folder for the results; None only prints them.
        switches: The switches of this benchmark that are given.
    """

    quick: bool
    repeats: int
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    out: Path | None
    switches: frozenset[str] = frozenset()


def options(
    description: str | None,
    arguments: Sequence[str] | None = None,
    *,
    repeats: int,
    switches: Mapping[str, str] = MappingProxyType({}),
) -> Options:
    """Parse the command line, and silence libraries.

    Args:
        description: The benchmark's docstring.
        arguments: The command-line arguments; None uses those of the process.
        repeats: Default number of timed rounds.
        switches: The switches of this benchmark alone, and what they do.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes, one round; results are written only with --out"
    )
    parser.add_argument("--repeats", type=int, default=repeats, help=f"number of timed rounds (default {repeats})")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32, and the device's default dtype")
    parser.add_argument("--out", type=Path, help="folder for the results (default benchmarks/results)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time what one core computes, on a CPU that others use too"
    )
    for name, meaning in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    parsed = parser.parse_args(arguments)
    if parsed.cpu_time:
        torch.set_num_threads(1)
        CLOCK["now"] = time.process_time
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = choose_device(parsed.device)
    default = dict.fromkeys((torch.float32, choose_dtype("auto", device)))
    return Options(
        quick=parsed.quick,
        repeats=1 if parsed.quick else parsed.repeats,
        device=device,
        dtypes=tuple(DTYPES[name] for name in parsed.dtype) if parsed.dtype else tuple(default),
        out=parsed.out or (None if parsed.quick else HERE / "results"),
        switches=frozenset(name for name in switches if getattr(parsed, name)),
    )


@dataclass(frozen=True)
class Timing:
    """The duration of each round, in seconds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of all rounds."""
        return median(self.rounds)

    @property
    def min(self) -> float:
        """The fastest round."""
        return min(self.rounds)

    @property
    def max(self) -> float:
        """The slowest round."""
        return max(self.rounds)

    def over(self, other: Timing) -> float:
        """Duration relative to another variant of the same interleaving: the median of the rounds' ratios."""
        return median(own / others for own, others in zip(self.rounds, other.rounds, strict=True))

    def cells(self) -> dict[str, Cell]:
        """The columns ``ms``, ``min`` and ``max`` of a row, in milliseconds."""
        return {"ms": self.median * 1e3, "min": self.min * 1e3, "max": self.max * 1e3}


def interleave(ways: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time several variants in turn: A B C A B C and so on.

    Short calls are made twice and the second is timed: during the first, caches hold the data of another variant.

    Args:
        ways: The functions to call, by name. A call should take at least a millisecond.
        repeats: Number of timed rounds.
        warmup: Number of rounds before these that are not timed.
    """
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    with Console(stderr=True).status("") as status:
        for turn in range(-warmup, repeats):
            for name, way in ways.items():
                status.update(f"{name}, round {turn + 1} of {repeats}" if turn >= 0 else f"{name}, warming up")
                seconds = _time(way)
                if seconds < SHORT:
                    seconds = _time(way)
                if turn >= 0:
                    rounds[name].append(seconds)
    return {name: Timing(tuple(seconds)) for name, seconds in rounds.items()}


def _time(way: Callable[[], object]) -> float:
    _wait()
    start = CLOCK["now"]()
    way()
    _wait()
    return CLOCK["now"]() - start


def _wait() -> None:
    """Wait until the device has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def in_child(function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Run a module's function in a new process, whose memory is unused, and return its result."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["hymba_tune.model"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of some work in bytes, beyond the memory in use before it; None if it cannot be measured.

    On CUDA this counts PyTorch's allocations. On a CPU it counts the process's resident pages, whose peak can be reset
    on Linux. Measure in a child process (`in_child`), because pages left over from earlier work are not counted again.
    The allocator is set to return freed memory at once, so that it is not counted either.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def megabytes(count: int | None) -> float | None:
    """Bytes in megabytes (10^6)."""
    return None if count is None else count / 1e6


def short(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@cache
def machine() -> dict[str, Any]:
    """The conditions of a measurement: processor, GPU, versions, threads, date and commit.

    Collected only once, because a GPU does not respond any more after a kernel fault.
    """
    installed = {distribution.name.lower() for distribution in metadata.distributions() if distribution.name}
    versions = {name: metadata.version(name) for name in LIBRARIES if name in installed}
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "instructions": _instructions(),
        "gpu": _gpu() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_at_start": round(LOAD_AT_START, 2),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **versions},
        "date": time.strftime("%Y-%m-%d"),
        "commit": _output("git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"),
    }


def _cpu_model() -> str:
    names = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return names[1].strip() if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _instructions() -> list[str]:
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return [name for name in INSTRUCTIONS if flags and name in flags[1].split()]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def _gpu() -> dict[str, str]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "name": torch.cuda.get_device_name(),
        "capability": capability,
        "driver": (driver or "unknown").splitlines()[0],
        "cuda": str(torch.version.cuda),
    }


def _output(*command: str) -> str | None:
    """A command's output; None if the command is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None if result.returncode == 0 else None


@cache
def slug(device: torch.device) -> str:
    """A short name of the machine for file names: of its GPU if that is measured, otherwise of its CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        model = re.sub(r"\(\w+\)|@.*|\b(cpu|processor)\b", " ", _cpu_model(), flags=re.IGNORECASE)
        name = f"{model} {_cores()} cores {' '.join(_instructions()[-1:])}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def report(
    name: str,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Cell]],
    notes: Sequence[str],
    options: Options,
    described: Mapping[str, Any] | None = None,
) -> None:
    """Print a table, and write it with the machine's description to ``<name>.<machine>.json``.

    Args:
        name: The table's name.
        columns: The columns in order, with units.
        rows: Cells by column; a missing cell stays empty.
        notes: What a reader must know to read the numbers.
        options: The command-line options.
        described: The `description` of the run; None for one on this machine.
    """
    described = described or description(options)
    facts, kind = described["run"]["machine"], described["device"]
    where = facts["gpu"]["name"] if kind == "cuda" else f"{facts['cpu']}, {facts['threads']} threads"
    table = Table(title=f"{name} · {where}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numeric = not any(isinstance(row.get(column), str) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(formatted(row.get(column))) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table, *map(escape, notes), sep="\n")
    if options.out is None:
        return
    result = {
        "name": name,
        "quick": described["quick"],
        "repeats": described["repeats"],
        "device": kind,
        "machine": facts,
        "columns": list(columns),
        "rows": [{column: _rounded(row.get(column)) for column in columns} for row in rows],
        "notes": list(notes),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    suffix = "_cpu_time" if CLOCK["now"] is time.process_time else ""
    path = options.out / f"{name}{suffix}.{described['run']['slug']}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"written to {path}")


def description(options: Options) -> dict[str, Any]:
    """The machine of a run, its short name for file names, and the options."""
    run = {"machine": machine(), "slug": slug(options.device)}
    return {"run": run, "quick": options.quick, "repeats": options.repeats, "device": options.device.type}


def formatted(cell: Cell) -> str:
    """Three significant digits of a float, all digits of an integer."""
    if cell is None:
        return ""
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) else cell
    decimals = 0 if abs(cell) >= 100 else 1 if abs(cell) >= 10 else 2
    return f"{cell:,.{decimals}f}"


def _rounded(cell: Cell) -> Cell:
    return float(f"{cell:.5g}") if isinstance(cell, float) else cell
